"""A stand-in for the hub: a server on the loopback interface that answers the calls of huggingface_hub.

Make a repository, check a card, announce files, upload large ones (Git LFS, basic transfer), commit, resolve a name.
"""
import base64
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    "Repositories in memory."
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Answers)
        self.repositories, self.objects, self.calls = {}, {}, []   # name -> {path: bytes}; hash -> bytes
        self.address = f'http://127.0.0.1:{self.server_address[1]}'
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answers(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    commit = 'c' * 40

    def log_message(self, *_): pass

    def answer(self, code, content=b'', **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def missing(self, code='RepoNotFound'):
        self.answer(404, dict(error='not found'), X_Error_Code=code)

    def do_POST(self):
        self.server.calls.append(f'POST {self.path}')
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.headers.get('Authorization') != 'Bearer hf_good':
            return self.answer(401, dict(error='Invalid credentials'))
        if self.path == '/api/repos/create':
            asked = json.loads(body)
            name = f'{asked.get("organization") or "me"}/{asked["name"]}'
            self.server.repositories.setdefault(name, {})
            return self.answer(200, dict(url=f'{self.server.address}/{name}', id=name, name=name))
        if self.path == '/api/validate-yaml':
            assert json.loads(body)['content'].startswith('---\n')
            return self.answer(200, dict(errors=[], warnings=[]))
        name = re.match(r'/(?:api/models/)?([^/]+/[^/.]+)', self.path)[1]
        if name not in self.server.repositories:
            return self.missing()
        if '/preupload/' in self.path:
            modes = [dict(path=file['path'], uploadMode='lfs' if file['path'].endswith('.safetensors') else 'regular',
                          shouldIgnore=False) for file in json.loads(body)['files']]
            return self.answer(200, dict(files=modes))
        if self.path.endswith('/info/lfs/objects/batch'):
            objects = [dict(item, actions=dict(upload=dict(href=f'{self.server.address}/lfs/{item["oid"]}')))
                       for item in json.loads(body)['objects'] if item['oid'] not in self.server.objects]
            return self.answer(200, dict(transfer='basic', objects=objects))
        if '/commit/' in self.path:
            return self.commit_files(name, body)
        raise AssertionError(f'the stand-in has no answer for POST {self.path}')

    def commit_files(self, name, body):
        if name == 'me/cut':   # the connection breaks
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        files = self.server.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            if line['key'] == 'lfsFile':
                files[value['path']] = self.server.objects[value['oid']]
        self.answer(200, dict(commitUrl=f'{self.server.address}/{name}/commit/{self.commit}', commitOid=self.commit,
                              success=True, hookOutput='', pullRequestUrl=None))

    def do_PUT(self):
        self.server.calls.append(f'PUT {self.path[:5]}')
        data = self.rfile.read(int(self.headers['Content-Length']))
        digest = hashlib.sha256(data).hexdigest()
        assert self.path == f'/lfs/{digest}'
        self.server.objects[digest] = data
        self.answer(200)

    def do_GET(self):
        self.server.calls.append(f'{self.command} {self.path}')
        match = re.fullmatch(r'/([^/]+/[^/]+)/resolve/[^/]+/(.+)', self.path.partition('?')[0])
        if not match:
            return self.missing()
        files = self.server.repositories.get(match[1])
        if files is None:
            return self.missing()
        if match[2] not in files:
            return self.missing('EntryNotFound')
        data = files[match[2]]
        etag = hashlib.sha256(data).hexdigest()
        self.answer(200, data, ETag=f'"{etag}"', X_Repo_Commit=self.commit)

    do_HEAD = do_GET
