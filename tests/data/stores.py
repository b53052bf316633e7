"""A server that speaks S3 on this machine, and a proxy before it that fails on purpose."""
import http.client
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SERVER = """
import logging, sys, time
from moto.server import ThreadedMotoServer
logging.disable(logging.CRITICAL)
server = ThreadedMotoServer('127.0.0.1', 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()    # until the tests end
"""
ERRORS = {500: b'InternalError', 503: b'SlowDown', 403: b'AccessDenied'}


def start_server():
    "moto's server in a process of its own: the process and its port."
    process = subprocess.Popen([sys.executable, '-c', SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:   # moto prints a line of its own first
        if line.strip().isdigit():
            return process, int(line)
    raise RuntimeError(f'the server ended with exit code {process.wait()}')


class Proxy(ThreadingHTTPServer):
    "Hands requests on to a server, but answers some of them with a fault."
    daemon_threads = True

    def __init__(self, port):
        super().__init__(('127.0.0.1', 0), Handler)
        self.port, self.lock, self.released = port, threading.Lock(), threading.Event()
        self.clear()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def clear(self):
        self.faults, self.requests = [], []

    def fail(self, what, fault, times=10**6):
        """Answer requests whose method and path contain `what` with a fault.

        500, 503, 403; cut: half a body. Until `released` is set: wait: nothing, then the answer; silent: no answer;
        half: half a body; drip: half a body and more byte after byte; deaf: does not read what is sent."""
        self.released.clear()
        self.faults.append([what, fault, times])

    def next_fault(self, request):
        with self.lock:
            for row in self.faults:
                if row[0] in request and row[2] > 0:
                    row[2] -= 1
                    self.requests.append((request, row[1]))
                    return row[1]
            self.requests.append((request, None))

    def count(self, fault): return sum(f == fault for _, f in self.requests)

    def handle_error(self, request, address): pass   # a client that was killed


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args): pass

    def answer(self):
        fault = self.server.next_fault(f'{self.command} {self.path}')
        if fault == 'deaf':
            self.server.released.wait(600)
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if fault in ERRORS:
            return self.send(fault, {}, b'<Error><Code>%s</Code><Message>on purpose</Message></Error>' % ERRORS[fault])
        if fault in ('silent', 'wait'):
            self.server.released.wait(600)
        if fault == 'silent':
            self.close_connection = True
            return
        server = http.client.HTTPConnection('127.0.0.1', self.server.port)
        server.request(self.command, self.path, body, dict(self.headers))
        reply = server.getresponse()
        own = 'transfer-encoding', 'connection', 'date', 'server'
        headers = {k: v for k, v in reply.getheaders() if k.lower() not in own}
        self.send(reply.status, headers, reply.read(), fault)
        server.close()

    def send(self, status, headers, data, fault=None):
        if self.command != 'HEAD':
            headers = {k: v for k, v in headers.items() if k.lower() != 'content-length'}
            headers['Content-Length'] = len(data)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == 'HEAD':
            return
        if fault in ('cut', 'half', 'drip'):
            self.send_part(data, fault)
        else:
            self.wfile.write(data)

    def send_part(self, data, fault):
        half, self.close_connection = len(data) // 2, True
        self.wfile.write(data[:half])
        self.wfile.flush()
        if fault == 'cut':
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == 'half':
            self.server.released.wait(600)
        else:
            for byte in data[half:]:
                self.wfile.write(bytes([byte]))
                if self.server.released.wait(.2):
                    break

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer
