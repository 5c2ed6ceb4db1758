"""A real S3 server on loopback, in this process."""

import contextlib
import json
import logging
import urllib.request
from collections.abc import Iterator

BUCKET = "bucket"
_ALLOWED_ON_ALL = ["s3:GetObject", "s3:ListBucket"]


@contextlib.contextmanager
def served_bucket(monkeypatch) -> Iterator[str]:
    """URL of an empty bucket; the environment says where and with which credentials."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    use_credentials(monkeypatch, "any", "any")
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    try:
        yield f"s3://{BUCKET}"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


def use_credentials(monkeypatch, key: str, secret: str) -> None:
    """Be someone from now on."""
    import s3fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    s3fs.S3FileSystem.clear_instance_cache()


def become_reader(monkeypatch, endpoint: str) -> None:
    """Be a user who may read, and not write; from now on the server asks who one is."""
    import boto3

    iam = boto3.client("iam")
    iam.create_user(UserName="reader")
    statement = {"Effect": "Allow", "Action": _ALLOWED_ON_ALL, "Resource": "*"}
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    iam.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    _ask_who_one_is(endpoint, after=0)
    use_credentials(monkeypatch, key["AccessKeyId"], key["SecretAccessKey"])


def become_owner(monkeypatch, endpoint: str) -> None:
    """Be who may do everything again."""
    _ask_who_one_is(endpoint, after=1 << 30)
    use_credentials(monkeypatch, "any", "any")


def _ask_who_one_is(endpoint: str, after: int) -> None:
    """Let the server check permissions after so many requests."""
    headers = {"Content-Type": "text/plain"}
    url = f"{endpoint}/moto-api/reset-auth"
    request = urllib.request.Request(url, str(after).encode(), headers, method="POST")
    urllib.request.urlopen(request).close()
