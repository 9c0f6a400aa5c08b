"""Passes TCP connections on to a Unix socket, for clients that know TCP alone: relay.py SOCKET prints the port."""

import socket
import socketserver
import sys
import threading


def pump(source, sink):
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        pass
    try:
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


class Relay(socketserver.BaseRequestHandler):
    def handle(self):
        with socket.socket(socket.AF_UNIX) as daemon:
            daemon.connect(sys.argv[1])
            back = threading.Thread(target=pump, args=(daemon, self.request), daemon=True)
            back.start()
            pump(self.request, daemon)
            back.join()


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128


with Server(("127.0.0.1", 0), Relay) as server:
    print(server.server_address[1], flush=True)
    server.serve_forever()
