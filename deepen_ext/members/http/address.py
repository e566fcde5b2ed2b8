"""Where a server is, and the key that it wants."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from deepen_ext.errors import InputError
from deepen_ext.ground.paths import user_path
from deepen_ext.members.load_options import KEY_FORMS

_PORTS = {"http": 80, "https": 443}
_OF_PATHS = "/%:@!$&'()*+,;="  # signs that a path may have; of others their bytes are sent, as in %20


@dataclass(frozen=True)
class Address:
    """A server's address.

    Attributes:
        scheme: "http" or "https".
        host: name or number.
        port: also where the name does not say one.
        path: before every endpoint, without "/v1" and without a slash at its end.
    """

    scheme: str
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host_and_port}{self.path}"

    @property
    def host_and_port(self) -> str:
        """As the header Host has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def read_address(name: str) -> Address:
    """The address that a member's name is.

    Raises:
        InputError: no host, a port that is none, a query, or a password in it.
    """
    try:
        parts = urlsplit(name)
        port = parts.port
        (parts.hostname or "").encode("idna")
    except ValueError as error:
        raise InputError(f"{name}: no address of a server ({error}); write http://host:port") from error
    if parts.username is not None or parts.password is not None:
        raise InputError(
            f"{parts.scheme}://...@{parts.hostname}: an address with a user or a password; give the server's "
            f"key with api_key={KEY_FORMS}"
        )
    if not parts.hostname or parts.query or parts.fragment or port == 0:
        raise InputError(f"{name}: no address of a server; write http://host:port, with a path if it has one")
    path = quote(parts.path.rstrip("/").removesuffix("/v1"), safe=_OF_PATHS)
    return Address(parts.scheme, parts.hostname, port or _PORTS[parts.scheme], path)


def read_key(where: str | None) -> str | None:
    """The key that ``env:NAME`` or ``file:PATH`` stands for. No message ever has the key itself.

    Raises:
        InputError: the variable is not set, the file cannot be read, or it is empty or no key.
    """
    if where is None:
        return None
    kind, _, place = where.partition(":")
    if kind == "env":
        key = os.environ.get(place)
        if key is None:
            raise InputError(f"api_key={where}: the environment has no {place}; set it, or leave api_key out")
    else:
        try:
            key = user_path(place).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "no text"
            raise InputError(f"api_key={where}: the file cannot be read ({why}); name another") from None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"api_key={where}: it holds no key, which is one word of ASCII; put the key there")
    return key
