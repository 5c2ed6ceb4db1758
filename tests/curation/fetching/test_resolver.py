import socket
import threading
import time

import pytest

from curation.fetching.outcomes import FetchError
from curation.fetching.resolver import Resolver


def resolver(lookup, **options) -> Resolver:
    return Resolver(allow_private=False, lookup=lookup, first_pause_s=0.05, **options)


def test_resolver__asks_once_for_many_threads():
    asked = []

    def lookup(host: str) -> list[str]:
        asked.append(host)
        time.sleep(0.05)
        return ["8.8.8.8"]

    names = resolver(lookup)
    threads = [threading.Thread(target=names.addresses, args=("a.test",)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == ["a.test"]


def test_resolver__unknown_names_are_final_and_remembered():
    asked = []

    def lookup(host: str) -> list[str]:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    names = resolver(lookup)
    for _ in range(3):
        with pytest.raises(FetchError, match=r"^dns$"):
            names.addresses("gone.test")
    assert asked == ["gone.test"]


def test_resolver__backs_off_as_a_whole_while_dns_is_down():
    down_until = time.monotonic() + 0.3
    asked = []

    def lookup(host: str) -> list[str]:
        asked.append(host)
        if time.monotonic() < down_until:
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return ["8.8.8.8"]

    names = resolver(lookup, attempts=8, max_lookups=2)
    threads = [threading.Thread(target=names.addresses, args=(f"{i}.test",)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) < 40 + 16  # 0.3 s of failures cost a handful of questions, not hundreds
    assert all(names.addresses(f"{i}.test") == ["8.8.8.8"] for i in range(40))


def test_resolver__a_temporary_failure_is_asked_again_later():
    answers = iter([socket.gaierror(socket.EAI_AGAIN, "try again")])

    def lookup(host: str) -> list[str]:
        for error in answers:
            raise error
        return ["8.8.8.8"]

    names = resolver(lookup, attempts=1)
    with pytest.raises(FetchError, match="dns_unavailable"):
        names.addresses("a.test")
    assert names.addresses("a.test") == ["8.8.8.8"]


def test_resolver__a_hanging_lookup_gives_the_thread_back():
    release = threading.Event()
    names = resolver(lambda _: release.wait(10) and ["8.8.8.8"], timeout_s=0.1)
    began = time.monotonic()
    with pytest.raises(FetchError, match="dns_unavailable"):
        names.addresses("slow.test")
    assert time.monotonic() - began < 5
    release.set()
    names.close()


def test_resolver__only_public_addresses_come_back():
    names = resolver(lambda _: ["10.0.0.1", "8.8.8.8", "::1"])
    assert names.addresses("mixed.test") == ["8.8.8.8"]
    with pytest.raises(FetchError, match="private_address"):
        resolver(lambda _: ["10.0.0.1"]).addresses("inside.test")


def test_resolver__labels_that_are_too_long_are_unknown_names():
    with pytest.raises(FetchError, match=r"^dns$"):
        Resolver(allow_private=True).addresses("a" * 70 + ".test")
