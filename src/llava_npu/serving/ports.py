"""Reserving a port."""

from __future__ import annotations

import errno
import socket

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
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror or error}; try 127.0.0.1, or 0.0.0.0 for all") from error
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
