"""Rules of who may reach a server, and the addresses at which it can be reached."""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of one's own machine."""
TOKEN_BYTES = 24


@dataclass(frozen=True)
class Access:
    """Rules of who may reach a server. By default only this machine may, under its own names."""

    hosts: frozenset[str] | None = LOCAL_NAMES
    """Names under which the server answers; `None` for every name. Another site's name that leads to this machine (DNS
    rebinding) is refused."""
    token: str | None = None
    """Secret that every request must have."""
    framed_by: str | None = None
    """Sites that may show the pages in a frame, in the words of a Content-Security-Policy."""


def is_loopback(host: str) -> bool:
    """True for an address that only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def access_at(host: str) -> Access:
    """Makes the access to a server that listens at an address: with a new token unless it is a loopback address."""
    if is_loopback(host):
        return Access(LOCAL_NAMES | {host})
    return Access(hosts=None, token=secrets.token_urlsafe(TOKEN_BYTES))


__all__ = ["Access", "access_at", "is_loopback"]
