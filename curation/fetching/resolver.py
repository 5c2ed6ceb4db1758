"""Names to checked addresses, each name looked up once, backing off as a whole when DNS fails."""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from curation.fetching.addresses import is_public
from curation.fetching.outcomes import FetchError

_MAX_NAMES = 100_000
_TEMPORARY = frozenset({socket.EAI_AGAIN, socket.EAI_FAIL, socket.EAI_MEMORY, socket.EAI_SYSTEM})
"""What resolvers answer when they are overloaded or unreachable; NXDOMAIN is not among them."""

Lookup = Callable[[str], list[str]]


def system_lookup(host: str) -> list[str]:
    """Ask the system's resolver for the addresses of a name; IPv4 first.

    Raises: socket.gaierror.
    """
    found: list[Any] = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    families = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    return list(dict.fromkeys(str(entry[4][0]) for entry in families))


class Resolver:
    """Looks names up in a few threads and remembers the answers.

    An overloaded resolver gets a pause that doubles with each failure, during which nobody asks:
    a list of a million names is not burned against a server that is down.
    """

    def __init__(
        self,
        *,
        allow_private: bool,
        allow_public: bool = True,
        timeout_s: float = 20.0,
        attempts: int = 4,
        first_pause_s: float = 1.0,
        max_lookups: int = 8,
        lookup: Lookup = system_lookup,
        is_public: Callable[[str], bool] = is_public,
    ) -> None:
        self._allow_private = allow_private
        self._allow_public = allow_public
        self._is_public = is_public
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._first_pause_s = first_pause_s
        self._lookup = lookup
        self._threads = ThreadPoolExecutor(max_lookups, thread_name_prefix="dns")
        self._lock = threading.Lock()
        self._names: dict[str, Future[list[str]]] = {}
        self._failures = 0
        self._resume_at = 0.0

    def addresses(self, host: str) -> list[str]:
        """Addresses of a host that may be connected to, IPv4 first.

        Raises:
            FetchError: dns, dns_unavailable, private_address or public_address where none may be.
        """
        allowed = [address for address in self._ask(host) if self._allows(address)]
        if not allowed:
            raise FetchError("public_address" if self._allow_private else "private_address")
        return allowed

    def close(self) -> None:
        """Stop; lookups that hang are left behind."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _allows(self, address: str) -> bool:
        return self._allow_public if self._is_public(address) else self._allow_private

    def _ask(self, host: str) -> list[str]:
        with self._lock:
            answer = self._names.get(host)
            if answer is None:
                self._forget_oldest()
                answer = self._names[host] = self._threads.submit(self._look_up, host)
        try:
            return answer.result(self._timeout_s)
        except FutureTimeoutError:
            raise FetchError("dns_unavailable") from None
        except socket.gaierror as error:
            self._forget(host, error)
            temporary = error.errno in _TEMPORARY
            raise FetchError("dns_unavailable" if temporary else "dns") from error
        except (UnicodeError, ValueError) as error:  # labels that are empty or too long
            raise FetchError("dns") from error

    def _look_up(self, host: str) -> list[str]:
        for attempt in range(1, self._attempts + 1):
            self._wait_for_pause()
            try:
                found = self._lookup(host)
            except socket.gaierror as error:
                if error.errno not in _TEMPORARY:
                    self._note(failed=False)
                    raise
                self._note(failed=True)
                if attempt == self._attempts:
                    raise
            else:
                self._note(failed=False)
                return found
        raise AssertionError("the last attempt returns or raises")

    def _note(self, *, failed: bool) -> None:
        with self._lock:
            self._failures = self._failures + 1 if failed else 0
            if failed:
                pause = min(self._first_pause_s * 2 ** (self._failures - 1), 30.0)
                self._resume_at = time.monotonic() + pause

    def _wait_for_pause(self) -> None:
        while (left := self._resume_at - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))

    def _forget(self, host: str, error: socket.gaierror) -> None:
        """A temporary failure is asked again by the next row of that host."""
        if error.errno in _TEMPORARY:
            with self._lock:
                self._names.pop(host, None)

    def _forget_oldest(self) -> None:
        if len(self._names) >= _MAX_NAMES:
            for host in list(self._names)[: _MAX_NAMES // 10]:
                del self._names[host]
