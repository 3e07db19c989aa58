"""Files on a disk, over HTTP or in S3, as streams of bytes.

Commands read what is remote: curl, which repeats a request after an error of the network, and aws, which knows the
user's credentials. They are started without a shell, and curl follows redirects to HTTP and HTTPS only.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO
from urllib.parse import urlparse
from urllib.request import url2pathname

from sequencer.files import check_regular

REMOTE = ("http", "https", "s3")  # schemes
CURL = ["curl", "--globoff", "--proto", "=http,https", "--proto-redir", "=http,https", "--connect-timeout", "30"]
CURL += ["--retry", "30", "--retry-delay", "2", "--fail", "--silent", "--location", "--"]


class CommandOutput:
    """The output of a command, whose failure is an error at the end of what it has written."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self._name = command[0]

    def read(self, size: int = -1) -> bytes:
        """Reads `size` bytes, or up to the end.

        Raises:
            OSError: the output has ended because the command has failed.
        """
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if (size < 0 or len(data) < size) and (code := self._process.wait()):
            raise OSError(f"{self._name} ends with exit code {code}")
        return data

    def close(self) -> None:
        """Ends the command."""
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.kill()
        self._process.wait()


@contextmanager
def open_stream(url: str) -> Iterator[IO[bytes] | CommandOutput]:
    """Opens a path, or a `file`, `http`, `https` or `s3` address, for reading from start to end.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    parts = urlparse(url)
    if parts.scheme in REMOTE:
        command = ["aws", "s3", "cp", url, "-"] if parts.scheme == "s3" else [*CURL, url]
        output = CommandOutput(command)
        try:
            yield output
        finally:
            output.close()
    else:
        path = url2pathname(parts.path) if parts.scheme == "file" else url
        check_regular(path)
        with open(path, "rb") as file:
            yield file
