"""The port that a server listens on, and the names that it answers to.

A web page can make its visitor's browser look up a name of the page's own domain at an address of the visitor's network
(DNS rebinding), and then talks with that machine's servers as if they were the page's own. Such a request carries the
page's name in its `Host` header, so a server that answers only to names it was given is out of reach.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import urlsplit

from llava_npu.errors import UserError


def open_port(host: str, port: int, send_timeout: float) -> socket.socket:
    """Reserves a port; nothing listens on it yet. Done before a model is loaded, which may take minutes.

    Args:
        port: 0 for any that is free.
        send_timeout: seconds after which a connection whose client takes nothing is closed (Linux).

    Raises:
        UserError: it is in use, or not ours to take.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # a label that is empty, or too long for a name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host}: {reason}; try 127.0.0.1, or 0.0.0.0 for all") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(send_timeout * 1000))
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise port_error(host, port, error) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL of a server behind a reserved port."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def port_error(host: str, port: int, error: OSError) -> UserError:
    """Says why a port cannot be had."""
    if error.errno == errno.EADDRINUSE:
        return UserError(f"--port {port}: in use on {host} by another program; choose another, or 0 for any")
    return UserError(f"cannot listen on {host}, port {port}: {error.strerror or error}")


ANY = "*"


class AllowedHosts:
    """The names and addresses by which clients may call a server."""

    def __init__(self, bound: str = "127.0.0.1", names: Sequence[str] = ()):
        """
        Args:
            bound: name or address that the server listens on.
            names: further ones, without a port; "*" for any.

        Raises:
            UserError: one that no client's `Host` can be.
        """
        self._names = {"localhost", _without_dot(bound), *map(_allowed_name, names)}
        # A name that is an address was not looked up, so it cannot have been rebound.
        self._any_address = not _is_loopback(bound)

    def __contains__(self, header: str) -> bool:
        """Whether a `Host` header, with or without a port, names this server."""
        if ANY in self._names:
            return True
        try:
            parts = urlsplit(f"//{header}")
            name = _without_dot(parts.hostname or "")
            well_formed = parts.path == parts.query == parts.fragment == "" and parts.username is None
            _ = parts.port  # raises for one that is not a number
        except ValueError:
            return False
        return well_formed and (name in self._names or _is_loopback(name) or (self._any_address and _is_address(name)))


def _allowed_name(given: str) -> str:
    name = _without_dot(given)
    if name == ANY or _is_address(name):
        return name
    with suppress(UnicodeError):
        name = name.encode("idna").decode()  # as browsers send it
        if re.fullmatch(r"[\w-]+(\.[\w-]+)*", name, re.ASCII):
            return name
    raise UserError(
        f"--allowed-hosts {given!r}: a name or an address is expected, without scheme and port, such as "
        f"llava.example.org; give the option again for another, and {ANY!r} alone for any"
    )


def _without_dot(name: str) -> str:
    return name.strip().lower().removesuffix(".").strip("[]")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)
