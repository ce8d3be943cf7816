"""What `browser` tests need: a headless Chromium, driven through chromedriver's WebDriver interface, onnxruntime-web, and a server for a folder."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import re
import shutil
import subprocess
import tarfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from planc.compiler.store import cache_dir

#: The release that the tests run, and what its package holds under the names that a page with one kind of backend loads.
ORT_WEB = "1.30.0"
ORT_WEB_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")

_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,1000",
)


class Browser:
    """One tab. Everything is a JSON request to chromedriver."""

    def __init__(self, port: int, binary: str, profile: Path) -> None:
        self.base = f"http://127.0.0.1:{port}/session"
        options = {"binary": binary, "args": [*_ARGUMENTS, f"--user-data-dir={profile}"]}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
            "timeouts": {"script": 300_000},
        }
        session = self._ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        self.base += f"/{session}"

    def open(self, address: str) -> None:
        """Load a page; what the console said before is forgotten."""
        self.console()
        self._ask("POST", "/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of the body of an async function in the page; `arguments` are its `args`."""
        body = (
            "const done = arguments[arguments.length - 1], args = Array.from(arguments).slice(0, -1);"
            f"(async () => {{ {script} }})().then((value) => done({{ value }}), (error) => done({{ error: String(error.stack ?? error) }}));"
        )
        answer = self._ask("POST", "/execute/async", {"script": body, "args": list(arguments)})
        assert "error" not in answer, answer["error"]
        return answer.get("value")

    def upload(self, selector: str, file: Path) -> None:
        """Choose a file in an input of the page."""
        found = self._ask("POST", "/element", {"using": "css selector", "value": selector})
        self._ask("POST", f"/element/{next(iter(found.values()))}/value", {"text": str(file)})

    def console(self) -> list[str]:
        """Warnings and errors of the console since the last call."""
        entries = self._ask("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]

    def dark(self, on: bool) -> None:
        """What `prefers-color-scheme` says."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if on else "light"}]
        self._ask("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}})

    def screenshot(self, file: Path, height: int = 1000) -> None:
        """The page from its top, as PNG."""
        clip = {"x": 0, "y": 0, "width": 1200, "height": height, "scale": 1}
        params = {"captureBeyondViewport": True, "clip": clip}
        file.write_bytes(
            base64.b64decode(self._ask("POST", "/goog/cdp/execute", {"cmd": "Page.captureScreenshot", "params": params})["data"])
        )

    def close(self) -> None:
        self._ask("DELETE", "")

    def _ask(self, method: str, path: str, data: Any = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.base + path, body, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=330) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {json.load(error)['value']['message']}") from None


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile. Skips the test where there is none."""
    driver = shutil.which("chromedriver")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if driver is None or binary is None:
        pytest.skip("no Chromium: chromium and chromedriver are not on the path")
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            port = next(int(found[1]) for line in process.stdout if (found := re.search(r"started successfully on port (\d+)", line)))
            browser = Browser(port, binary, profile)
            yield browser
            browser.close()
        finally:
            process.terminate()


def onnxruntime_web() -> Path:
    """The folder with `ORT_WEB_FILES`, fetched from the npm registry once per machine. Skips the test where that is not possible."""
    folder = cache_dir() / "npm" / f"onnxruntime-web-{ORT_WEB}"
    if not all((folder / name).is_file() for name in ORT_WEB_FILES):
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("no onnxruntime-web: npm is not installed")
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [npm, "pack", "--silent", f"onnxruntime-web@{ORT_WEB}"], cwd=folder, capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode:
            pytest.skip(f"no onnxruntime-web: {done.stderr.strip().splitlines()[-1:]}")
        packed = folder / done.stdout.split()[-1]
        with tarfile.open(packed) as archive:
            for name in ORT_WEB_FILES:
                source = archive.extractfile(f"package/dist/{name}")
                assert source is not None
                (folder / name).write_bytes(source.read())
        packed.unlink()
    return folder


class _Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {  # noqa: RUF012 - as the base class declares it
        ".html": "text/html",
        ".css": "text/css",
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".json": "application/json",
        "": "application/octet-stream",
    }

    def log_message(self, *arguments: Any) -> None:
        """Tests print nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a local server for the folder."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()
