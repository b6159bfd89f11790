/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rr: request/response and connect/request/response/close over TCP.
 *
 *   rr server PORT            answers one byte with one byte, every connection
 *   rr rr ADDRESS PORT SECONDS    one connection; prints transactions a second
 *   rr crr ADDRESS PORT SECONDS   a new connection for each transaction
 *
 * The server is one thread around epoll, so that both ends can be pinned to one
 * processor. The client closes with a reset (SO_LINGER 0) in crr: no port waits
 * in TIME_WAIT, at either end.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void set(int fd, int level, int option)
{
	int one = 1;

	if (setsockopt(fd, level, option, &one, sizeof(one)))
		err(1, "setsockopt");
}

static _Noreturn void server(int port)
{
	struct sockaddr_in6 at = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	int listener = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0);
	int poll = epoll_create1(0);
	struct epoll_event event = { .events = EPOLLIN, .data.fd = listener };

	set(listener, SOL_SOCKET, SO_REUSEADDR);
	if (bind(listener, (struct sockaddr *)&at, sizeof(at)) || listen(listener, 1024))
		err(1, "port %d", port);
	epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);

	for (;;) {
		struct epoll_event ready[64];
		int n = epoll_wait(poll, ready, 64, -1);

		for (int i = 0; i < n; i++) {
			int fd = ready[i].data.fd;
			char byte;

			if (fd == listener) {
				while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
					set(fd, IPPROTO_TCP, TCP_NODELAY);
					event.data.fd = fd;
					epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
				}
			} else if (read(fd, &byte, 1) != 1 || write(fd, &byte, 1) != 1) {
				close(fd);	/* end of file or reset */
			}
		}
	}
}

static int dial(const struct addrinfo *to)
{
	struct timeval patience = { .tv_sec = 3 };
	int fd = socket(to->ai_family, SOCK_STREAM, 0);

	if (fd < 0)
		err(1, "socket");
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	if (connect(fd, to->ai_addr, to->ai_addrlen))
		err(1, "connect");
	set(fd, IPPROTO_TCP, TCP_NODELAY);
	return fd;
}

static void transact(int fd)
{
	char byte = 'x';

	if (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1)
		err(1, "transaction");
}

int main(int argc, char **argv)
{
	struct addrinfo hints = { .ai_flags = AI_NUMERICHOST, .ai_socktype = SOCK_STREAM }, *to;
	struct linger reset = { .l_onoff = 1 };
	unsigned long count = 0;
	double begin, end;
	int fd = -1;

	signal(SIGPIPE, SIG_IGN);
	if (argc == 3 && !strcmp(argv[1], "server"))
		server(atoi(argv[2]));
	if (argc != 5 || (strcmp(argv[1], "rr") && strcmp(argv[1], "crr")))
		errx(2, "usage: rr server PORT | rr rr|crr ADDRESS PORT SECONDS");
	if (getaddrinfo(argv[2], argv[3], &hints, &to))
		errx(2, "not an address and a port: %s %s", argv[2], argv[3]);

	begin = now();
	end = begin + atof(argv[4]);
	if (!strcmp(argv[1], "rr"))
		fd = dial(to);
	while (now() < end) {
		if (fd >= 0) {
			transact(fd);
		} else {
			int one = dial(to);

			transact(one);
			setsockopt(one, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
			close(one);
		}
		count++;
	}
	printf("%.1f\n", count / (now() - begin));
	return 0;
}
