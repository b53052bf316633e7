"""Commands in a terminal of 80 columns and with their output in files, and what a person would see of them."""
import fcntl
import json
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass, field
from pathlib import Path

from support import BIN, ROOT, SIGN

COLUMNS, LIMIT = 80, 5.   # of the terminal; seconds without a word
FOREIGN = re.compile(r'\bwarn(ing)?s?\b|warning:|deprecat|^Traceback|\[[WE]\d{3}', re.I)   # our own lines say "note"


@dataclass
class Watched:
    "A command's output, its exit code, and its longest silence."
    out: str
    err: str
    code: int
    silence: float        # seconds in which it could run and printed nothing
    columns: int | None   # of its terminal; None for a file

    def faults(self) -> list[str]:
        "What would trouble a person, a line for each."
        faults = [] if self.code == 0 else [f'exit code {self.code}: {self.err or self.out[-1000:]}']
        if self.silence > LIMIT * max(os.getloadavg()[0] / os.cpu_count(), 1):   # others' work delays what is printed
            faults.append(f'silent for {self.silence:.1f} s')
        faults += [f'a warning: {line}' for line in self.lines if FOREIGN.search(line)]
        if self.columns:
            wide = [line for line in self.lines if len(line) > self.columns]   # a path is not cut
            faults += [f'{len(line)} columns: {line}' for line in wide if max(map(len, line.split())) < 70]
        else:
            faults += [f'on the error stream: {line}' for line in self.err.splitlines()
                       if line.strip() and not SIGN.fullmatch(line)]
            faults += [f'a bar in a file: {line!r}' for line in self.out.split('\n') if '\r' in line or '\x1b' in line]
        return faults

    @property
    def lines(self) -> list[str]:
        "What was on a line of the terminal at any time, without colours."
        text = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', self.out + self.err)
        return [line for line in re.split(r'[\r\n]+', text) if line.strip()]


@dataclass
class Silence:
    "The longest time without output, less the time in which a process was ready and had no core."
    pid: int
    longest: float = 0.
    since: float = field(default_factory=time.monotonic)
    delayed: float = 0.   # seconds that the process has waited for a core, till the last output

    def look(self, has_output: bool):
        try:
            delayed = int(Path(f'/proc/{self.pid}/schedstat').read_text().split()[1]) / 1e9
        except (OSError, IndexError):   # it has ended
            delayed = self.delayed
        now = time.monotonic()
        self.longest = max(self.longest, now - self.since - (delayed - self.delayed))
        if has_output:
            self.since, self.delayed = now, delayed


class Terminal:
    "A pseudo terminal; `name` is the end that a command writes to."
    def __init__(self):
        self.reader, self.writer = os.openpty()
        fcntl.ioctl(self.writer, termios.TIOCSWINSZ, struct.pack('HHHH', 24, COLUMNS, 0, 0))
        self.name, self.out = os.ttyname(self.writer), b''

    def read(self) -> bool:
        "Take what has come; whether there was anything."
        size = len(self.out)
        while select.select([self.reader], [], [], 0)[0]:
            self.out += os.read(self.reader, 65536)
        return len(self.out) > size

    def close(self) -> str:
        self.read()
        os.close(self.reader)
        os.close(self.writer)
        return self.out.decode().replace('\r\n', '\n')


class Watcher:
    "Runs commands, in forks of a server or in processes of their own, and watches them."
    def __init__(self):
        env = {k: v for k, v in os.environ.items() if k not in ('COLUMNS', 'LINES', 'PYTHONWARNINGS')}
        self.env = env | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT), PATH=f'{BIN}{os.pathsep}{env["PATH"]}')
        self.server = None

    def start_server(self):
        code = Path(__file__).with_name('fork_server.py')
        self.server = subprocess.Popen([sys.executable, code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       text=True, env=self.env)
        assert self.server.stdout.readline() == 'ready\n'

    def close(self):
        if self.server:
            self.server.terminate()   # the end of its input may be held open by a fork of this process
            self.server.stdin.close()
            self.server.wait()

    def run(self, words: list, folder: Path, terminal: bool, own_process: bool = False, seconds: float = 60) -> Watched:
        "Run a command and watch it; a command that takes longer than `seconds` is ended and reported as such."
        screen = Terminal() if terminal else None
        files = [Path(screen.name)] * 2 if terminal else [folder/'.out', folder/'.err']
        if not terminal:
            for file in files:
                file.write_bytes(b'')
        begin = self._begin_process if own_process else self._begin_fork
        pid, ended = begin([str(word) for word in words], folder, files)
        silence, size, end = Silence(pid), 0, time.monotonic() + seconds
        while (code := ended()) is None:
            time.sleep(.02)
            if terminal:
                has_output = screen.read()
            else:
                has_output = (now := sum(file.stat().st_size for file in files)) > size
                size = now
            silence.look(has_output)
            if time.monotonic() > end:
                os.killpg(pid, 9)
                end += 1e9
        out, err = (screen.close(), '') if terminal else (file.read_text() for file in files)
        return Watched(out, err, code, silence.longest, COLUMNS if terminal else None)

    def _begin_fork(self, words: list, folder: Path, files: list) -> tuple:
        if self.server is None:
            self.start_server()
        request = dict(words=words, folder=str(folder), out=str(files[0]), err=str(files[1]))
        self.server.stdin.write(json.dumps(request) + '\n')
        self.server.stdin.flush()
        pid = int(self.server.stdout.readline())

        def ended():
            return int(self.server.stdout.readline()) if select.select([self.server.stdout], [], [], 0)[0] else None
        return pid, ended

    def _begin_process(self, words: list, folder: Path, files: list) -> tuple:
        out, err = (open(file, 'ab', buffering=0) for file in files)
        process = subprocess.Popen([BIN/words[0], *words[1:]], stdout=out, stderr=err, stdin=subprocess.DEVNULL,
                                   cwd=folder, env=self.env, start_new_session=True)
        out.close()
        err.close()
        return process.pid, process.poll
