"""What strangers send as pictures: refused with a plain sentence, and nothing reached that is not theirs to reach."""

import base64
import http.server
import io
import ipaddress
import os
import re
import socket
import struct
import threading
import time
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Image as HFImage
from PIL import Image

from processing_mmgpt import MMGPTImageProcessor
from processing_mmgpt.image_files_mmgpt import OWN_IMAGES, ImageError, ImagePolicy, open_image, shorten
from processing_mmgpt.messages_mmgpt import normalise
from processing_mmgpt.serving.fetching import fetch, is_public


HOST, SECOND = "pictures.example", "cdn.example"
PUBLIC = "93.184.216.34"
NOWHERE = ImagePolicy()
TO_HOST = ImagePolicy(fetch=partial(fetch, hosts=(HOST, SECOND), timeout=1.0), max_bytes=100_000)


def encoded(kind="PNG", size=(8, 6), mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    Image.fromarray(noise, "RGBA").convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(data: bytes, kind="png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


# Files that are no honest pictures


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *before: bytes, rows: bytes | None = None) -> bytes:
    """A greyscale PNG that says it has a size, and holds whatever rows."""
    data = zlib.compress(bytes((width + 1) * height) if rows is None else rows, 9)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def frames(kind: str) -> bytes:
    buffer = io.BytesIO()
    pictures = [Image.new("RGB", (8, 8), (40 * number, 0, 0)) for number in range(3)]
    pictures[0].save(buffer, kind, save_all=True, append_images=pictures[1:])
    return buffer.getvalue()


def with_size(data: bytes, at: int, pattern: str, *size: int) -> bytes:
    return data[:at] + struct.pack(pattern, *size) + data[at + struct.calcsize(pattern) :]


def huge_jpeg() -> bytes:
    data = encoded("JPEG")
    return with_size(data, data.index(b"\xff\xc0") + 5, ">HH", 65000, 65000)


GOOD, JPEG = encoded(), encoded("JPEG")
BOMB = zlib.compress(bytes(80_000_000), 9)
FILES = {
    "png of 50,000 x 50,000": png(50_000, 50_000, rows=b""),
    "png of 9,000 x 9,000 zeros": png(9_000, 9_000),
    "png of 2 billion columns": png(2**31 - 1, 1, rows=b""),
    "png of no columns": png(0, 4, rows=b""),
    "thin png": png(1, 2_000_000),
    "gif of 65,535 x 65,535": with_size(encoded("GIF", mode="L"), 6, "<HH", 65535, 65535),
    "jpeg of 65,000 x 65,000": huge_jpeg(),
    "text bomb": png(4, 4, chunk(b"zTXt", b"a\0\0" + BOMB), rows=None),
    "profile bomb": png(4, 4, chunk(b"iCCP", b"a\0\0" + BOMB))[:-40],
    "too many bytes": GOOD + bytes(33 * 2**20),
    "animated gif": frames("GIF"),
    "animated webp": frames("WEBP"),
    "animated png": frames("PNG"),
    "tiff": encoded("TIFF"),
    "tiff of pages": frames("TIFF"),
    "eps": encoded("EPS"),
    "pdf": encoded("PDF"),
    "ico": encoded("ICO"),
    "ppm that is a script": b"P6\n# \n`id`\n1 1\n255\n\0\0\0",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "html": b"<html><script>alert(1)</script></html>",
    "zip before a picture": b"PK\x03\x04" + GOOD,
    "pdf before a picture": b"%PDF-1.4\n" + JPEG,
    "html before a picture": b"<html>" + encoded("GIF", mode="L"),
    "gif that is a script": b"GIF89a/*" + b"\0" * 12 + b"*/=1;alert(1)",
    "no bytes": b"",
    "one byte": b"\x89",
    "header alone": GOOD[:33],
    "cut png": GOOD[:-40],
    "cut jpeg": JPEG[: len(JPEG) // 2],
    "cut webp": encoded("WEBP")[:-20],
    "wrong checksum": GOOD[:29] + b"\0\0\0\0" + GOOD[33:],
    "wrong data": GOOD[:60] + bytes(20) + GOOD[80:],
    "chunk longer than the file": with_size(GOOD, 8, ">I", 2**31 - 1),
}

TEXTS = {
    "not base64": "data:image/png;base64,%%%",
    "base64 cut": "data:image/png;base64,iVBORw0KGgo=A",
    "no base64": "data:image/png,abc",
    "other type": "data:text/html;base64," + base64.b64encode(GOOD).decode(),
    "type of two": "data:image/png,text/html;base64,AAAA",
    "svg as text": "data:image/svg+xml;utf8,<svg/>",
    "empty": "",
    "picture of the machine": "examples/records/colour.png",
    "absolute": str(Path(__file__).parents[1] / "examples" / "records" / "colour.png"),
    "password file": "/etc/passwd",
    "climbing": "../../../../etc/passwd",
    "home": "~/.ssh/id_rsa",
    "null": "a.png\0.jpg",
    "device": "/dev/zero",
    "descriptor": "/proc/self/fd/0",
    "drive": "C:\\Windows\\win.ini",
    "share": "\\\\server\\share\\a.png",
    "base64 without a header": base64.b64encode(GOOD).decode(),
    "lone surrogate": "\ud800.png",
}

SCHEMES = {
    "file": "file:///etc/passwd",
    "FILE": "FILE:///etc/passwd",
    "file without slashes": "file:/etc/passwd",
    "file with a host": "file://localhost/etc/passwd",
    "space before": " file:///etc/passwd",
    "ftp": "ftp://127.0.0.1/a.png",
    "gopher": "gopher://127.0.0.1:6379/_INFO",
    "dict": "dict://127.0.0.1:11211/stats",
    "jar": "jar:http://127.0.0.1!/a.png",
    "unix": "http+unix://%2Fvar%2Frun%2Fdocker.sock/info",
    "ldap": "ldap://127.0.0.1/",
    "s3": "s3://bucket/a.png",
    "view-source": "view-source:http://127.0.0.1/",
    "javascript": "javascript:alert(1)",
    "no scheme": "//127.0.0.1/a.png",
}

# Addresses that stay inside, each as the one allowed host: even so it is refused.
INSIDE = """
    127.0.0.1 127.1 127.0.1 127.255.255.254 0 0.0.0.0 2130706433 0x7f000001 0x7f.0.0.1 0x7f.1 0177.0.0.1 0177.1
    017700000001 0300.0250.0.1 3232235521 localhost localhost. 10.0.0.1 172.16.0.1 192.168.0.1 169.254.169.254
    2852039166 0xa9fea9fe 100.64.0.1 198.18.0.1 192.0.2.1 224.0.0.1 240.0.0.1 255.255.255.255 [::] [::1]
    [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::127.0.0.1] [::ffff:a9fe:a9fe] [64:ff9b::7f00:1]
    [64:ff9b:1::1] [2002:7f00:1::] [2001:0:4136:e378:8000:63bf:80ff:fffe] [fe80::1] [fe80::1%25lo] [fc00::1]
    [fd00:ec2::254] [ff02::1]
""".split()

# Addresses that readers take for different hosts; {inside} is the local server, `HOST` is allowed.
DISGUISES = {
    "user": "http://pictures.example@{inside}/",
    "user and password": "http://pictures.example:80@{inside}/",
    "fragment": "http://{inside}#@pictures.example/",
    "query": "http://{inside}?@pictures.example/",
    "backslash and at": "http://pictures.example\\@{inside}/",
    "at and backslash": "http://{inside}\\@pictures.example/",
    "backslashes": "http:\\\\{inside}\\a.png",
    "suffix": "http://pictures.example.{inside}/",
    "prefix": "http://evil-pictures.example/",
    "subdomain": "http://evil.pictures.example/",
    "other port": "http://pictures.example:22/",
    "port out of range": "http://pictures.example:99999/",
    "port no number": "http://pictures.example:http/",
    "three slashes": "http:///{inside}/",
    "no host": "http://",
    "open bracket": "http://[::1/",
    "wide dot": "http://pictures\u3002example/",
    "circled letter": "http://\u24dfictures.example/",
    "line break": "http://pictures.example/\r\nHost: {inside}",
    "tab": "http://pictures.example\t.{inside}/",
    "percent": "http://%31%32%37.0.0.1/",
    "null": "http://pictures.example\0.{inside}/",
}

# What an allowed host answers, and what for.
REDIRECTS = {
    "to this machine": "http://{inside}/secret.png",
    "to a decimal address": "http://2130706433/secret.png",
    "to metadata": "http://169.254.169.254/latest/meta-data/",
    "to another host": "http://evil.example/a.png",
    "to a file": "file:///etc/passwd",
    "to data": data_url(GOOD),
    "to another port": "http://pictures.example:8080/a.png",
    "to itself": "http://pictures.example/redirect?to={quoted}",
    "to a host inside": "http://cdn.example/secret.png",
    "without scheme": "//{inside}/secret.png",
    "to nothing": "http://[/",
}
ANSWERS = "missing compressed endless long drip slow_header no_http many_headers cut text animated hundred".split()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves a picture at /a.png, and what a wicked host would; counts who comes."""

    def do_GET(self):
        self.server.hits.append(self.headers["Host"] + self.path)
        name = self.path.strip("/").partition("?")[0]
        getattr(self, f"send_{name}", self.send_picture)()

    def send_picture(self, body=GOOD, status=200, **headers):
        self.send_response(status)
        for key, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def send_redirect(self):
        self.send_picture(b"", 302, Location=self.server.location)

    def send_missing(self):
        self.send_picture(status=404)

    def send_compressed(self):
        self.send_picture(zlib.compress(bytes(10_000_000)), Content_Encoding="deflate")

    def send_long(self):
        self.send_picture(GOOD + bytes(200_000))

    def send_endless(self):
        self.send_response(200)
        self.end_headers()
        self.repeat(bytes(10_000), 0)

    def send_drip(self):
        self.send_response(200)
        self.end_headers()
        self.repeat(b"\0", 0.1)

    def send_slow_header(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        self.repeat(b"x", 0.1)

    def send_hundred(self):
        self.repeat(b"HTTP/1.1 100 Continue\r\n\r\n", 0.05)

    def send_no_http(self):
        self.wfile.write(b"220 ftp.example ready\r\n")

    def send_many_headers(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000 + b"\r\n")

    def send_cut(self):
        self.send_picture(GOOD[:-20], Content_Length=str(len(GOOD)))

    def send_text(self):
        self.send_picture(b"<html>")

    def send_animated(self):
        self.send_picture(frames("GIF"))

    def repeat(self, piece, pause):
        end = time.monotonic() + 20
        try:
            while time.monotonic() < end:
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(pause)
        except OSError:
            pass  # the client has gone, as it should

    def log_message(self, *args):
        pass


class Internet:
    """Names and addresses of a small internet, all of it one local server; `tried` are the addresses connected to."""

    def __init__(self, monkeypatch):
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
        self.server.daemon_threads = True
        self.server.hits, self.tried = [], []
        self.inside = f"127.0.0.1:{self.server.server_port}"
        self.names = {HOST: [[PUBLIC]], SECOND: [["10.0.0.7"]]}  # a list for each look-up; the last one stays
        self.really = {"getaddrinfo": socket.getaddrinfo, "create_connection": socket.create_connection}
        for name in self.really:
            monkeypatch.setattr(socket, name, getattr(self, name))
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def getaddrinfo(self, host, port, *args, **kwargs):
        if host not in self.names:
            return self.really["getaddrinfo"](host, port, *args, **kwargs)
        answers = self.names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    def create_connection(self, address, timeout=None, **kwargs):
        self.tried.append(address[0])
        return self.really["create_connection"](("127.0.0.1", self.server.server_port), timeout, **kwargs)


@pytest.fixture
def internet(monkeypatch):
    internet = Internet(monkeypatch)
    yield internet
    internet.server.shutdown()
    internet.server.server_close()


def refuse(source, policy=NOWHERE) -> str:
    with pytest.raises(ImageError) as caught:
        MMGPTImageProcessor(size=224).square(open_image(source, policy))
    message = str(caught.value)
    assert message.endswith(".") and len(message) < 400
    assert not re.search(r"0x[0-9a-f]{9}|Traceback|Errno|BytesIO", message)  # CVE-2026-22778: addresses of the memory
    return message


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_honest_pictures_are_refused(name):
    refuse(FILES[name])
    refuse(data_url(FILES[name]))


@pytest.mark.parametrize("name", TEXTS)
def test_paths_and_damaged_data_urls_are_refused(name):
    refuse(TEXTS[name])


@pytest.mark.parametrize("name", SCHEMES)
def test_other_schemes_are_refused_even_where_hosts_are_allowed(internet, name):
    for policy in (NOWHERE, TO_HOST):
        refuse(SCHEMES[name], policy)
    assert not internet.tried


@pytest.mark.parametrize("host", INSIDE)
def test_an_address_inside_is_refused_in_every_spelling(internet, host):
    port = internet.server.server_port
    allowed = host.strip("[]").lower()
    refuse(f"http://{host}:{port}/secret.png")
    message = refuse(
        f"http://{host}:{port}/secret.png", ImagePolicy(fetch=partial(fetch, hosts=(f"{allowed}:{port}",)))
    )
    assert "not public" in message or "could not be fetched" in message  # no name to this system's resolver
    refuse(f"https://{host}/secret.png", ImagePolicy(fetch=partial(fetch, hosts=(allowed,))))
    assert not internet.tried and not internet.server.hits


@pytest.mark.parametrize("name", DISGUISES)
def test_an_address_in_disguise_is_refused(internet, name):
    refuse(DISGUISES[name].format(inside=internet.inside), TO_HOST)
    assert not internet.tried and not internet.server.hits


@pytest.mark.parametrize("name", REDIRECTS)
def test_every_hop_of_a_redirect_is_checked(internet, name):
    internet.server.location = REDIRECTS[name].format(inside=internet.inside, quoted="%2F")
    refuse(f"http://{HOST}/redirect", TO_HOST)
    assert set(internet.tried) == {PUBLIC} and not any("secret" in hit for hit in internet.server.hits)
    assert len(internet.server.hits) <= 4


@pytest.mark.parametrize("name", ANSWERS)
def test_what_an_allowed_host_answers_is_limited_in_size_and_time(internet, name):
    start = time.monotonic()
    refuse(f"http://{HOST}/{name}", TO_HOST)
    assert time.monotonic() - start < 5  # the limit is 1 s, of the wicked host 20 s


DNS = {
    "inside": [["127.0.0.1"]],
    "public and inside": [[PUBLIC, "127.0.0.1"]],
    "mapped": [["::ffff:10.0.0.1"]],
    "inside for the redirect": [[PUBLIC], ["127.0.0.1"]],
}


@pytest.mark.parametrize("name", DNS)
def test_names_that_lead_inside_are_refused(internet, name):
    internet.names[HOST] = DNS[name]
    internet.server.location = f"http://{HOST}/secret.png"
    refuse(f"http://{HOST}/redirect", TO_HOST)
    assert not any("secret" in hit for hit in internet.server.hits) and set(internet.tried) <= {PUBLIC}


def test_a_name_is_looked_up_once_and_the_address_that_was_checked_is_used(internet):
    internet.names[HOST] = [[PUBLIC], ["127.0.0.1"]]
    assert open_image(f"http://{HOST}/a.png", TO_HOST).size == (8, 6)
    assert internet.tried == [PUBLIC] and internet.server.hits == [f"{HOST}/a.png"]


def test_an_allowed_host_is_fetched_from_and_its_redirects_are_followed(internet):
    internet.names[SECOND] = [[PUBLIC]]
    internet.server.location = f"http://{SECOND}/a.png?size=large"
    picture = open_image(f"http://{HOST}/redirect", TO_HOST)
    assert picture.tobytes() == Image.open(io.BytesIO(GOOD)).tobytes()
    assert internet.server.hits == [f"{HOST}/redirect", f"{SECOND}/a.png?size=large"]
    picture = open_image(f"http://{HOST}:8080/a.png", ImagePolicy(fetch=partial(fetch, hosts=(f"{HOST}:8080",))))
    assert picture.size == (8, 6)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_of_the_internet_are_public(address):
    assert is_public(address)
    assert not is_public(str(ipaddress.ip_address("192.168.3.4")))


@pytest.mark.parametrize(
    "address",
    [
        "fec0::1",
        "feff::1",
        "3fff::1",
        "3fff:fff::1",
        "5f00::1",
        "4000::1",
        "64:ff9b:1::808:808",
        "::8.8.8.8",
        "1000::",
    ],
)
def test_addresses_that_nobody_is_given_are_not_public(address):
    assert not is_public(address)


# What is opened


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "MPO"])
def test_still_pictures_are_opened_from_bytes_and_data_urls(kind):
    options = {"save_all": True, "append_images": [Image.new("RGB", (4, 3))]} if kind == "MPO" else {}
    data = encoded(kind, **options)
    for source in (data, data_url(data), data_url(data, "jpeg").replace("data:image/jpeg", "DATA:image/jpeg")):
        assert open_image(source, NOWHERE).size == (8, 6)


def test_own_pictures_are_opened_by_path_and_in_more_formats(tmp_path):
    for kind in ("PNG", "BMP", "TIFF", "PPM", "JPEG2000"):
        path = tmp_path / f"a.{kind}"
        path.write_bytes(encoded(kind))
        assert open_image(path).size == open_image(str(path)).size == (8, 6)
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "missing.png")


@pytest.mark.parametrize("wrong", ["folder", "pipe", "a" * 5000, "a\0b", "http://pictures.example/a.png", "device"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, wrong):
    if wrong == "pipe":
        os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    path = "/dev/zero" if wrong == "device" else str(tmp_path / wrong) if wrong in ("folder", "pipe") else wrong
    refuse(path, OWN_IMAGES)


def test_what_is_quoted_in_a_message_is_short_whatever_it_is():
    many, deep = ["lol"] * 10, []
    for _ in range(8):
        many = [many] * 10  # 58 MB, if all of it were written
    for _ in range(5000):
        deep = [deep]
    values = [many, deep, {"a": deep}, "a" * 5000, b"a" * 5000, {f"{n}": "a" * 80 for n in range(99)}, None, 7]
    assert max(len(shorten(value)) for value in values) < 200
    assert [shorten(value) for value in ("a", 0.5, {"a": ["b"]})] == ["'a'", "0.5", "{'a': ['b']}"]
    for wrong in (deep, many, [{"role": deep}], [{"role": "user", "content": [deep]}]):
        with pytest.raises((TypeError, ValueError)) as error:
            normalise(wrong)
        assert len(str(error.value)) < 400


def test_sixteen_bits_of_grey_keep_their_contrast():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(ramp).save(buffer, kind)
        picture = open_image(buffer.getvalue())
        assert np.array_equal(np.asarray(picture), ramp >> 8)
    for values in (ramp.astype(np.int32), (ramp / 65535).astype(np.float32)):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "TIFF")
        assert "8 bits" in refuse(buffer.getvalue(), OWN_IMAGES)


@pytest.mark.parametrize("mode", ["CMYK", "P", "PA", "LA", "1", "L", "RGBA"])
def test_other_modes_show_what_they_hold(mode):
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30), (200, 0, 0)).convert(mode.replace("PA", "P")).save(
        buffer, "TIFF" if mode == "CMYK" else "PNG"
    )
    picture = MMGPTImageProcessor(size=24).square(open_image(buffer.getvalue()))
    expected = Image.open(buffer).convert("RGB").getpixel((0, 0))
    assert picture.mode == "RGB" and picture.size == (24, 24) and picture.getpixel((3, 3)) == expected


def test_a_square_stays_as_it_is():
    processor = MMGPTImageProcessor(size=24)
    once = processor.square(open_image(encoded(size=(50, 30))))
    assert processor.square(once).tobytes() == once.tobytes() and once.size == (24, 24)


# One picture, whatever it comes as


def pixels_or_refusal(source):
    try:
        return MMGPTImageProcessor(size=24).pixels(source)
    except ImageError as error:
        return re.sub(r".*?(has|is) ", "", str(error), count=1)


def forms(picture, kind, tmp_path):
    """A picture as a file of that kind, in every form that a file takes."""
    path = tmp_path / "picture.bin"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow will not save every mode in every format for ever
        picture.save(path, kind)
    column = {"bytes": path.read_bytes(), "path": None}
    decoded = HFImage().decode_example(column)
    return path, str(path), path.read_bytes(), Image.open(path), decoded, column, {"bytes": None, "path": str(path)}


SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
EIGHT = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "RGBX", "RGBa", "La")
KINDS = ("PNG", "TIFF", "JPEG", "BMP", "PPM", "JPEG2000", "WEBP", "GIF")


def of_mode(mode):
    if mode in SIXTEEN:
        order = ">u2" if mode == "I;16B" else "<u2"
        values = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(order)
        return Image.frombytes(mode, (40, 30), values.tobytes())
    if mode in ("I", "F"):
        return Image.fromarray(np.linspace(0, 255, 1200).reshape(30, 40).astype({"I": "int32", "F": "float32"}[mode]))
    return Image.frombytes(mode, (40, 30), np.random.default_rng(0).bytes(len(Image.new(mode, (40, 30)).tobytes())))


@pytest.mark.parametrize("mode", [*EIGHT, *SIXTEEN, "I", "F"])
def test_a_picture_is_the_same_by_every_road_for_every_mode_of_pillow(tmp_path, mode):
    for kind in KINDS:
        try:
            given = forms(of_mode(mode), kind, tmp_path)
        except (OSError, ValueError):  # Pillow saves no such mode in this format
            continue
        first, *others = map(pixels_or_refusal, given)
        for other in others:
            assert torch.equal(other, first) if isinstance(first, torch.Tensor) else other == first


@pytest.mark.parametrize("mode", [*EIGHT, *SIXTEEN])
def test_every_mode_with_a_range_is_taken(mode):
    assert open_image(of_mode(mode)).mode in EIGHT
    assert MMGPTImageProcessor(size=24).pixels(of_mode(mode)).shape == (3, 24, 24)


@pytest.mark.parametrize("mode", SIXTEEN)
def test_sixteen_bits_are_their_high_byte_by_every_road(mode):
    picture = of_mode(mode)
    high = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16) >> 8
    array = (high.astype(np.uint16) << 8) + 7
    for source in (picture, array, array.astype(">u2"), array[..., None], torch.from_numpy(array)):
        assert np.array_equal(np.asarray(open_image(source)), high)
    colour = np.stack([array] * 3, axis=-1)
    assert np.array_equal(np.asarray(open_image(colour)), np.stack([high] * 3, axis=-1))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint32"])
@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 3)])
def test_numbers_without_a_known_range_are_refused_by_every_road(dtype, shape):
    array = np.ones(shape, dtype)
    sources = [array, torch.from_numpy(np.moveaxis(array, -1, 0).copy())]
    if dtype in ("int32", "float32") and len(shape) == 2:
        sources.append(Image.fromarray(array))
    for source in sources:
        with pytest.raises(ImageError, match="without a known range"):
            open_image(source)
    with pytest.raises(ImageError, match="without a known range"):
        open_image(torch.ones(shape, dtype=torch.bfloat16))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_tensor_has_its_channels_first_and_an_array_last(channels):
    array = np.random.default_rng(0).integers(0, 256, (30, 40, channels), dtype=np.uint8)
    expected = MMGPTImageProcessor(size=24).pixels(array[..., 0] if channels == 1 else Image.fromarray(array))
    for source in (array, torch.from_numpy(array).permute(2, 0, 1), torch.from_numpy(array).permute(2, 0, 1) * 1):
        assert torch.equal(MMGPTImageProcessor(size=24).pixels(source), expected)
    truth = array > 127
    assert np.array_equal(np.asarray(open_image(truth[..., 0])), truth[..., 0] * np.uint8(255))


def test_frames_of_a_video_are_pictures_by_the_same_road():
    array = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)
    processor = MMGPTImageProcessor(size=24)
    frames = processor.frames([array, of_mode("I;16"), torch.from_numpy(array)])
    assert all(torch.equal(frame, processor.pixels(array)) for frame in frames)


def test_an_animated_picture_is_refused_as_a_file_and_as_a_picture():
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "GIF", save_all=True, append_images=[Image.new("L", (8, 8), 255)])
    for source in (buffer.getvalue(), Image.open(buffer)):
        with pytest.raises(ImageError, match="animated"):
            open_image(source)


@pytest.mark.parametrize("column", [{"bytes": "/etc/hostname"}, {"bytes": 3, "path": None}, {}, {"path": 1, "x": 1}])
def test_a_column_that_holds_no_bytes_is_refused(column):
    with pytest.raises(TypeError):
        open_image(column)


def test_a_column_is_opened_under_the_policy(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="not read from paths"):
        open_image({"bytes": None, "path": str(tmp_path / "a.png")}, ImagePolicy())
