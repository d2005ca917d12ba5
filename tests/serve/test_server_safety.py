"""Who may use the server, and what a request may cost it."""

import base64
import http.client
import io
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cli_tools import Capture, call_rt
from facts import assert_facts, has_fact
from PIL import Image
from server_tools import Server, png, serving, wait_for

pytestmark = pytest.mark.deep

KEY = "a key that nobody guesses"
PATHS = ("/", "/api/state", "/v1/models", "/sdapi/v1/options", "/metrics", "/docs", "/openapi.json")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two keys, other names, and another site's page."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "keys").write_text(f"# mine\n\n{KEY}\nanother key\n")
    allowed = ("--allow-host", "images.example.org", "--allow-origin", "https://chat.example.org")
    with serving(folder, "--api-key-file", folder / "keys", *allowed) as running:
        yield running


def basic(text: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}


@pytest.mark.parametrize("path", PATHS)
def test_without_the_key_nothing_is_answered(locked: Server, path: str) -> None:
    with locked.client() as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, basic("user:wrong"), {"Authorization": "Basic ?"}):
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401
            assert "key" in answer.text
            scheme = "Bearer" if path.startswith(("/v1", "/sdapi")) else "Basic"
            assert answer.headers["WWW-Authenticate"].startswith(scheme)


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": f"Bearer {KEY}"}, basic(f"anyone:{KEY}"), basic(KEY), {"Authorization": "bearer another key"}],
)
def test_a_key_lets_in(locked: Server, headers: dict[str, str]) -> None:
    with locked.client(headers=headers) as client:
        assert client.get("/api/state").json()["needs_key"] is True
        assert client.get("/v1/models").status_code == 200


def test_images_are_fetched_without_the_key(locked: Server) -> None:
    with locked.client() as client:
        body = {"prompt": "a", "size": "64x64", "response_format": "url"}
        answer = client.post("/v1/images/generations", json=body, headers={"Authorization": f"Bearer {KEY}"})
        url = answer.json()["data"][0]["url"]
        assert client.get(url).headers["content-type"] == "image/png"
        assert client.get(url[:-5] + "0.png").status_code == 404
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 200


def test_a_wrong_key_leaves_the_body_unread(locked: Server) -> None:
    """Megabytes are not read for someone who may send none."""
    address = httpx.URL(locked.url)
    with socket.create_connection((address.host, address.port or 0), timeout=20) as raw:
        raw.sendall(b"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000000\r\n\r\n")
        assert b" 401 " in raw.recv(1000)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("127.0.0.1:9", True),
        ("[::1]:7860", True),
        ("192.168.1.20", True),
        (socket.gethostname(), True),
        ("images.example.org", True),
        ("IMAGES.example.org:80", True),
        ("evil.example.org", False),
        ("localhost.evil.example.org", False),
        ("localhost@evil.example.org", False),
        ("127.0.0.1.evil.example.org", False),
        ("", False),
        ("[::1", False),
        ("localhost:port", False),
    ],
)
def test_only_names_of_this_machine(locked: Server, host: str, allowed: bool) -> None:
    """A page of evil.example.org that resolves to this machine sends that name."""
    with locked.client(headers={"Authorization": f"Bearer {KEY}", "Host": host}) as client:
        for path in ("/api/state", "/v1/models"):
            answer = client.get(path)
            assert answer.status_code == (200 if allowed else 403), answer.text
            if not allowed and host:
                assert "--allow-host" in answer.text


@pytest.mark.parametrize("origin", ["https://evil.example.org", "null", "http://127.0.0.1:1", "http://localhost"])
@pytest.mark.parametrize("path", ["/api/jobs", "/v1/images/generations", "/sdapi/v1/interrupt"])
def test_pages_of_other_sites_may_not_call(client: httpx.Client, path: str, origin: str) -> None:
    answer = client.post(path, json={"prompt": "a"}, headers={"Origin": origin})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    assert client.options(path, headers={"Origin": origin}).status_code == 403


def test_our_own_page_and_an_allowed_one_may(server: Server, locked: Server) -> None:
    with server.client() as client:
        assert client.post("/sdapi/v1/interrupt", headers={"Origin": server.url}).status_code == 200
    origin = "https://chat.example.org"
    with locked.client(headers={"Origin": origin}) as client:
        asked = client.options("/v1/images/generations", headers={"Access-Control-Request-Method": "POST"})
        assert asked.status_code == 204
        answers = [
            asked,
            client.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"}),
            client.get("/v1/models"),
        ]
        assert [answer.status_code for answer in answers] == [204, 200, 401]
        assert [answer.headers["access-control-allow-origin"] for answer in answers] == [origin] * 3
        assert "authorization" in asked.headers["access-control-allow-headers"]


@pytest.mark.parametrize("name", ["..%2f..%2fserver.log", "%2e%2e/server.log", "....//server.log", "keys", "a%00.png"])
def test_no_path_leads_out_of_a_folder(client: httpx.Client, name: str) -> None:
    for path in (f"/images/{name}", f"/page/{name}", f"/api/images/{name}"):
        for method in ("GET", "DELETE"):
            assert client.request(method, path).status_code in (404, 405)


def test_a_link_in_the_folder_is_not_followed(server: Server, client: httpx.Client) -> None:
    secret = server.log.parent / "secret"
    secret.write_text("secret")
    link = server.log.parent / "images" / ("zimage-0000000000000-000-" + "0" * 32 + ".png")
    link.symlink_to(secret)
    try:
        assert client.get(f"/images/{link.name}").status_code == 404
        assert client.get("/api/images", params={"limit": 200}).status_code == 200
    finally:
        link.unlink()


def test_a_body_that_states_its_length_is_refused_at_once(client: httpx.Client) -> None:
    for path in ("/api/jobs", "/v1/images/edits", "/sdapi/v1/img2img"):
        request = client.build_request("POST", path, content=b"{}")
        request.headers["Content-Length"] = str(1 << 40)
        address = httpx.URL(client.base_url)
        with socket.create_connection((address.host, address.port or 0), timeout=20) as raw:
            raw.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {1 << 40}\r\n\r\n".encode())
            assert b" 413 " in raw.recv(1000)


@pytest.mark.parametrize("path", ["/api/jobs", "/v1/images/edits", "/sdapi/v1/img2img"])
def test_a_body_of_unknown_length_is_counted_while_it_is_read(client: httpx.Client, path: str) -> None:
    """70 MB are sent, of which 64 MiB may be read."""

    def pieces() -> Iterator[bytes]:
        for _ in range(70):
            yield b" " * 1_000_000

    try:
        answer = client.post(path, content=pieces(), headers={"Content-Type": "application/json"})
    except httpx.WriteError:  # the server closed the connection before all was sent
        return
    assert answer.status_code == 413
    assert has_fact(answer.text, 64 << 20)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that claims any number of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60_000, 60_000), (8_000, 8_000), (1 << 30, 1 << 30)])
def test_an_image_with_too_many_pixels_is_not_decoded(
    client: httpx.Client, server: Server, size: tuple[int, int]
) -> None:
    before = server.metric('zimage_memory_bytes{process="engine"}')
    text = base64.b64encode(bomb(*size)).decode()
    for path, body in (
        ("/api/jobs", {"prompt": "a", "image": text}),
        ("/v1/images/edits", {"prompt": "a", "image": text}),
        ("/sdapi/v1/img2img", {"prompt": "a", "init_images": [text]}),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code in (400, 422)
        assert "pixels" in answer.text
    assert server.metric('zimage_memory_bytes{process="engine"}') < before + 50e6


def test_text_that_expands_is_not_read(client: httpx.Client) -> None:
    """A PNG's compressed text may be as much a bomb as its pixels."""
    data = zlib.compress(bytes(200_000_000))
    text = b"Comment\0\0" + data
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    image = png(Image.new("RGB", (64, 64)))
    whole = base64.b64encode(image[:33] + chunk + image[33:]).decode()
    answer = client.post("/v1/images/edits", json={"prompt": "a", "image": whole, "size": "64x64"})
    assert answer.status_code in (200, 400)
    assert client.get("/healthz").status_code == 200


def test_a_reader_that_does_not_read_costs_nothing(client: httpx.Client, server: Server) -> None:
    """Its events stay in the log that all readers share, and the job goes on."""
    id = client.post("/api/jobs", json={"prompt": "a", "width": 64, "height": 64, "steps": 2, "count": 16}).json()["id"]
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port or 0), timeout=20) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        raw.sendall(f"GET /api/jobs/{id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        wait_for(lambda: client.get(f"/api/jobs/{id}").json()["state"] == "done")


def test_a_connection_without_a_request_keeps_no_one_out(client: httpx.Client, server: Server) -> None:
    address = httpx.URL(server.url)
    open_ones = [http.client.HTTPConnection(address.host, address.port or 0) for _ in range(50)]
    try:
        for connection in open_ones:
            connection.connect()
        assert client.get("/healthz").status_code == 200
    finally:
        for connection in open_ones:
            connection.close()


def test_answers_carry_what_keeps_browsers_safe(client: httpx.Client) -> None:
    answer = client.get("/docs")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "http" not in answer.text.replace("httpx", ""), "nothing from elsewhere"
    assert "/v1/images/generations" in answer.text


def test_nested_json_is_no_crash(client: httpx.Client) -> None:
    deep = "[" * 100_000
    for path in ("/api/jobs", "/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/sdapi/v1/options"):
        answer = client.post(path, content=deep, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), answer.text


@pytest.mark.parametrize(
    "text", ['{"prompt": "\\ud800"}', '{"prompt": 1e999}', '{"prompt": "\\u0000"}', "\xff", "", "null"]
)
def test_strange_json_is_refused_or_run(client: httpx.Client, text: str) -> None:
    for path in ("/api/jobs", "/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img"):
        content = text.encode("latin-1")
        answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code < 500, answer.text


def test_a_form_of_many_parts_is_refused(client: httpx.Client) -> None:
    fields = {f"field{number}": "x" for number in range(200)}
    answer = client.post("/v1/images/edits", data=fields, files={"image": b"x"})
    assert answer.status_code == 400
    answer = client.post("/v1/images/edits", data={"prompt": "x" * 2_000_000}, files={"image": b"x"})
    assert answer.status_code in (400, 413)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.20", "example.org"])
def test_others_than_this_machine_need_a_key(capsys: Capture, host: str) -> None:
    outcome = call_rt(capsys, "serve", "--host", host)
    assert outcome.status == 1
    assert_facts(outcome.err.strip(), host, "--api-key-file")


@pytest.mark.parametrize(
    ("content", "fact"), [("", "no key"), ("# only\n", "no key"), ("short\n", "8"), (None, "keys")]
)
def test_keys_that_cannot_serve(capsys: Capture, tmp_path: Path, content: str | None, fact: str) -> None:
    if content is not None:
        (tmp_path / "keys").write_text(content)
    outcome = call_rt(capsys, "serve", "--api-key-file", tmp_path / "keys")
    assert outcome.status == 1
    assert fact in outcome.err


def test_an_image_file_is_what_was_asked(server: Server, client: httpx.Client) -> None:
    """Names end with 128 random bits: two images of one request share none of them."""
    answer = client.post(
        "/v1/images/generations", json={"prompt": "a", "size": "64x64", "n": 2, "response_format": "url"}
    )
    names = [one["url"].rpartition("-")[2].removesuffix(".png") for one in answer.json()["data"]]
    assert all(len(name) == 32 for name in names)
    assert sum(a == b for a, b in zip(*names, strict=True)) < 12
    image = Image.open(io.BytesIO(client.get(answer.json()["data"][0]["url"]).content))
    assert image.size == (64, 64)
