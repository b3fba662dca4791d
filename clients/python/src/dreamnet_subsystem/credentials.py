"""Where the orchestrator is, and what is shown to it: a certificate, which also serves, or a token."""

import ipaddress
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import grpc

from .options import OptionError

MAX_FILE = 1 << 20  # Bytes of a certificate, a key or a token: far more than any of them has.

# Requests of up to 64 MiB arrive; an orchestrator never sends larger ones. Without SO_REUSEPORT, a second process on
# the same port fails, instead of getting half of the connections.
SERVER_OPTIONS = [("grpc.max_receive_message_length", 65 << 20), ("grpc.so_reuseport", 0)]
# The orchestrator's address is dialed as it is given, like its command line does.
CHANNEL_OPTIONS = [("grpc.enable_http_proxy", 0)]


@dataclass(frozen=True)
class Address:
    """Where an orchestrator listens."""

    url: str
    """With its scheme: `http://HOST:PORT`, `https://HOST:PORT` or `unix:/PATH`."""

    @classmethod
    def parse(cls, option: str, given: object, scheme: str = "http") -> "Address":
        """Reads it. HOST:PORT gets this scheme. Raises OptionError."""
        forms = "give http://HOST:PORT, https://HOST:PORT or unix:/PATH"
        if isinstance(given, str):
            if re.fullmatch(r"unix:/\S+", given):
                return cls(given)
            if match := re.fullmatch(r"(?:(https?)://)?([^\s/@?#]+?|\[[0-9A-Fa-f:.]+\]):(\d{1,5})/?", given):
                if int(match[3]) <= 65535 and (":" not in match[2] or match[2].startswith("[")):
                    return cls(f"{match[1] or scheme}://{match[2]}:{match[3]}")
        raise OptionError(f"{option} is {given!r}; {forms}")

    @property
    def target(self) -> str:
        """As gRPC dials it."""
        return self.url if self.url.startswith("unix:") else self.url.partition("://")[2]

    @property
    def is_tls(self) -> bool:
        return self.url.startswith("https://")

    @property
    def is_local(self) -> bool:
        """True if it can only be on this machine."""
        return self.url.startswith("unix:") or is_loopback(self.target.rpartition(":")[0])


def is_loopback(host: str) -> bool:
    """True if it is an address of this machine that others can't reach."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@dataclass(frozen=True)
class Credentials:
    """A directory with a certificate, as `orchestrator certs issue` makes it, or a file with a token, or nothing."""

    path: Path | None = None
    ca_file: Path | None = None
    """With a token or nothing: the only authorities of the orchestrator that are trusted. None for the system's."""

    @property
    def has_certificate(self) -> bool:
        return self.path is not None and self.path.is_dir()

    def check(self, orchestrator: Address | None) -> None:
        """Raises OptionError if they can't be used with this orchestrator."""
        if self.path is None:
            return
        if not self.path.exists():
            raise OptionError(
                f"credentials: {self.path} does not exist; give a directory with cert.pem, key.pem and ca.pem, or a "
                "file with a token"
            )
        if self.has_certificate:
            self._certificate()
            if orchestrator and not orchestrator.is_tls:
                advice = orchestrator.url.replace("http:", "https:")
                raise OptionError(f"credentials: the certificate is not used at {orchestrator.url}; give {advice}")
        elif orchestrator:
            self._token()
            if not orchestrator.is_tls and not orchestrator.is_local:
                raise OptionError(
                    f"credentials: the token would be sent in clear to {orchestrator.url}; "
                    "give an address with https://"
                )

    def serving(self) -> grpc.ServerCredentials:
        """TLS for clients that show a certificate of the same authority. The files are read again for each connection.

        Raises OptionError if they can't be read.
        """

        def current() -> grpc.ServerCertificateConfiguration:
            key, certificate, authority = self._certificate()
            return grpc.ssl_server_certificate_configuration([(key, certificate)], authority)

        return grpc.dynamic_ssl_server_credentials(current(), current, require_client_authentication=True)

    def connect(self, orchestrator: Address) -> grpc.aio.Channel:
        """A new connection, with the files as they are now.

        Raises OptionError if they can't be read.
        """
        if not orchestrator.is_tls:
            return grpc.aio.insecure_channel(orchestrator.target, options=CHANNEL_OPTIONS)
        if self.has_certificate:
            key, certificate, authority = self._certificate()
            tls = grpc.ssl_channel_credentials(authority, key, certificate)
        else:
            tls = grpc.ssl_channel_credentials(_read(self.ca_file) if self.ca_file else None)
        return grpc.aio.secure_channel(orchestrator.target, tls, options=CHANNEL_OPTIONS)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call to the orchestrator carries.

        Raises OptionError if the file with the token can't be read.
        """
        if self.path is None or self.has_certificate:
            return ()
        return (("authorization", f"Bearer {self._token()}"),)

    def _certificate(self) -> tuple[bytes, bytes, bytes]:
        directory = self.path or Path()
        return _read(directory / "key.pem", secret=True), _read(directory / "cert.pem"), _read(directory / "ca.pem")

    def _token(self) -> str:
        token = _read(self.path or Path(), secret=True).decode(errors="replace").strip()
        if not re.fullmatch(r"[!-~]+", token):
            raise OptionError(f"credentials: {self.path} contains no token; it has the form orc_ID_SECRET, or is a JWT")
        return token


def _read(path: Path, secret: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            mode = stat.S_IMODE(status.st_mode)
            # A file of root may be readable by its group: so services get secrets.
            if secret and mode & (0o037 if status.st_uid == 0 else 0o077):
                raise OptionError(
                    f"credentials: {path} has mode {mode:04o}, so that other users of this machine could use it; run "
                    "chmod 600 on it"
                )
            return file.read(MAX_FILE)
    except OSError as error:
        raise OptionError(f"credentials: {path} can't be read: {error.strerror}") from None
