"""Fetching a picture from a host that is allowed by name, so that no address of a stranger leads anywhere else.

What such an address can try: https://cheatsheetseries.owasp.org/cheatsheets/Server_Side_Request_Forgery_Prevention_Cheat_Sheet.html.
"""

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Collection
from urllib.parse import SplitResult, urljoin, urlsplit

from ..image_files_mmgpt import ImageError, shorten


MAX_REDIRECTS = 3
PORTS = {"http": 80, "https": 443}
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052, the last 32 bits are an IPv4 address
# The part of IPv6 that is given out, https://www.iana.org/assignments/ipv6-unicast-address-assignments, and in it what
# is for documents (RFC 9637), which not every Python knows of.
GIVEN_OUT, DOCUMENTS = ipaddress.ip_network("2000::/3"), ipaddress.ip_network("3fff::/20")


def fetch(url: str, max_bytes: int, hosts: Collection[str], timeout: float = 10.0) -> bytes:
    """Fetch the file behind an address; with its hosts bound, the `fetch` of an `ImagePolicy`.

    Every address on the way, redirects included, has to be of an allowed host. Its name is looked up once, each
    address it has has to be a public one, and the connection goes to the address that was checked. Proxies of the
    environment are not used.

    Args:
        url: An `http` or `https` address.
        max_bytes: Size of the largest file that is read.
        hosts: Names that are allowed, such as `"example.org"`, with the port unless it is the usual one.
        timeout: Seconds for all of it, from the first connection on.

    Raises:
        ImageError: If an address is refused, or nothing comes back from it in size and time.
    """
    deadline = time.monotonic() + timeout
    for _ in range(MAX_REDIRECTS + 1):
        target = check_url(url, hosts)
        try:
            location, body = _get(target, _public_address(target), max_bytes, deadline)
        except (OSError, http.client.HTTPException) as error:
            raise ImageError(f"The picture at {shorten(url)} could not be fetched.") from error
        if location is None:
            return body
        try:
            url = urljoin(url, location)
        except ValueError:
            raise ImageError(f"{shorten(url)} leads to what is no address.") from None
    raise ImageError(f"The picture at {shorten(url)} is behind more than {MAX_REDIRECTS} redirects.")


def check_url(url: str, hosts: Collection[str]) -> SplitResult:
    """Take an address apart; raise `ImageError` unless it is a plain one of an allowed host."""
    if not re.fullmatch(r"[!-\[\]-~]+", url):  # printable ASCII without the backslash, which readers take differently
        raise ImageError(f"{shorten(url)} is no plain address: it holds spaces, backslashes or other than ASCII.")
    try:
        target = urlsplit(url)
        port = target.port or PORTS.get(target.scheme)
    except ValueError:
        raise ImageError(f"{shorten(url)} is no address.") from None
    if target.scheme not in PORTS or not target.hostname or "@" in target.netloc:
        raise ImageError(f"Pictures are fetched by http and https, without user and password; got {shorten(url)}.")
    host = target.hostname if port == PORTS[target.scheme] else f"{target.hostname}:{port}"
    if host not in hosts:
        raise ImageError(f"Pictures are not fetched from {shorten(host)}: it is not among the allowed hosts.")
    return target


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, an IPv4 address inside an IPv6 one included."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip not in GIVEN_OUT or ip in DOCUMENTS:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _public_address(target: SplitResult) -> tuple[str, int]:
    """Look a host up, once; every address that it has must be public."""
    port = target.port or PORTS[target.scheme]
    try:
        found = socket.getaddrinfo(target.hostname, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # the codec of host names refuses it
        raise OSError(f"{target.hostname} is no host name") from error
    addresses = [entry[4][0] for entry in found]
    if not all(map(is_public, addresses)):
        raise ImageError(f"Pictures are not fetched from {shorten(target.hostname)}: its address is not public.")
    return addresses[0], port


def _get(target: SplitResult, address: tuple[str, int], max_bytes: int, deadline: float) -> tuple[str | None, bytes]:
    """Ask one address; returns where it redirects to, or `None` and the file."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock = socket.create_connection(address, timeout=left)
    if target.scheme == "https":
        context = ssl.create_default_context()
        sock = context.wrap_socket(sock, server_hostname=target.hostname, do_handshake_on_connect=False)
    # A timeout of sockets starts anew with every byte; this one ends the connection.
    end = threading.Timer(deadline - time.monotonic(), _cut, [sock])
    end.start()
    try:
        if target.scheme == "https":
            sock.do_handshake()
        return _ask(sock, target, max_bytes)
    finally:
        end.cancel()
        sock.close()
        if time.monotonic() >= deadline:
            raise TimeoutError


def _cut(sock: socket.socket) -> None:
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # the plain one: TLS would wait for an answer
    except OSError:
        pass  # closed in the meantime


def _ask(sock: socket.socket, target: SplitResult, max_bytes: int) -> tuple[str | None, bytes]:
    connection = http.client.HTTPConnection(target.hostname)
    connection.sock = sock
    path = (target.path or "/") + (f"?{target.query}" if target.query else "")
    headers = {"Host": target.netloc, "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    location = response.getheader("Location")
    if response.status in (301, 302, 303, 307, 308) and location:
        return location, b""
    url = shorten(target.geturl())
    if response.status != 200 or response.getheader("Content-Encoding", "identity") != "identity":
        raise ImageError(f"{url} answers with status {response.status}, or compressed; expected a file as it is.")
    body = response.read(max_bytes + 1)
    if len(body) > max_bytes:
        raise ImageError(f"The file at {url} is larger than the {max_bytes:,} bytes that are read.")
    if response.length:  # what it announced and did not send
        raise http.client.IncompleteRead(body, response.length)
    return None, body
