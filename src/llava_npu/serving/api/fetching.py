"""Fetching an image from the web for somebody else, without becoming their way into this network.

Whatever a URL looks like (a name, a decimal number, IPv6, an IPv4 address inside IPv6), what counts is the address that
would be connected to. So the check sits where connections are opened: the name is looked up once, all its addresses
must be public, and the connection goes to one that was checked. A name that answers differently the next time (DNS
rebinding) gains nothing; redirections open connections too, and pass the same check. Proxies from the environment are
not used: they would do the looking-up themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

from llava_npu.errors import UserError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]

_REDIRECTIONS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTIONS = 3
_SPECIAL = (ipaddress.ip_network("192.0.0.0/24"), ipaddress.ip_network("192.88.99.0/24"))  # IANA's; Python knows a part
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet; an IPv4 address inside an IPv6 one must, too."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if any(address in network for network in _NAT64):
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if int(address) >> 32 == 0 and int(address) > 1:  # ::a.b.c.d, long out of use
            inner.append(ipaddress.IPv4Address(int(address)))
        embedded = [each for each in inner if each is not None]
        if embedded:
            return all(is_public(each) for each in embedded)
    if any(address in network for network in _SPECIAL):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


async def resolve_name(host: str, port: int) -> list[str]:
    """All addresses of a host, as the system knows them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class ImageFetcher:
    """Fetches images by http and https."""

    def __init__(
        self,
        *,
        max_bytes: int,
        timeout: float,
        allowed: Callable[[Address], bool] = is_public,
        resolve: Resolve = resolve_name,
    ):
        """
        Args:
            max_bytes: of one image's file.
            timeout: seconds for one image, redirections included.
            allowed: which addresses may be connected to.
            resolve: from a name to its addresses.
        """
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._backend = _CheckedBackend(allowed, resolve)

    async def fetch(self, url: str) -> bytes:
        """The bytes behind a URL.

        Raises:
            UserError: not http or https, a private address, an error status, too large, too slow or too many
                redirections.
        """
        shown = url if len(url) <= 200 else f"{url[:200]}…"
        try:
            async with asyncio.timeout(self._timeout):
                return await self._follow(url, shown)
        except TimeoutError as error:
            raise UserError(f"image {shown}: not there after {self._timeout:g} s (--read-timeout)") from error
        except UserError:
            raise
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError, ValueError) as error:
            raise UserError(f"image {shown}: cannot be fetched: {error or type(error).__name__}") from error

    async def _follow(self, url: str, shown: str) -> bytes:
        async with httpcore.AsyncConnectionPool(network_backend=self._backend) as pool:
            for _ in range(_MAX_REDIRECTIONS + 1):
                self._check_form(url, shown)
                async with pool.stream("GET", url, headers={"User-Agent": "llava-npu", "Accept": "image/*"}) as reply:
                    if reply.status not in _REDIRECTIONS:
                        return await self._read(reply, shown)
                    url = urljoin(url, _header(reply, b"location"))
        raise UserError(f"image {shown}: more than {_MAX_REDIRECTIONS} redirections")

    def _check_form(self, url: str, shown: str) -> None:
        try:
            parts = urlsplit(url)
            fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
            httpcore.URL(url)
        except (ValueError, TypeError, UnicodeError):
            fine = False
        if not fine or not url.isascii():
            raise UserError(f"image {shown}: not an http or https URL that can be fetched")

    async def _read(self, reply: httpcore.Response, shown: str) -> bytes:
        if reply.status != 200:
            raise UserError(f"image {shown}: the server there answers with status {reply.status}")
        data = bytearray()
        async for chunk in reply.aiter_stream():
            data += chunk
            if len(data) > self._max_bytes:
                raise UserError(f"image {shown}: larger than {self._max_bytes:,} bytes (--max-request-mib)")
        return bytes(data)


def _header(reply: httpcore.Response, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in reply.headers if key.lower() == name), "")


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Opens connections to allowed addresses only."""

    def __init__(self, allowed: Callable[[Address], bool], resolve: Resolve):
        self._allowed = allowed
        self._resolve = resolve
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._resolve(host, port)
        if not addresses or not all(self._allowed(ipaddress.ip_address(each)) for each in addresses):
            raise UserError(f"image: {host} is not a public address; this server fetches from the public internet only")
        for address in addresses[:-1]:  # a host may have an IPv6 address that this machine cannot reach
            with contextlib.suppress(httpcore.NetworkError, OSError):
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
        return await self._inner.connect_tcp(addresses[-1], port, timeout, local_address, socket_options)

    async def connect_unix_socket(self, path: str, *arguments: Any, **more: Any) -> httpcore.AsyncNetworkStream:
        raise UserError("image: local sockets are not connected to")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
