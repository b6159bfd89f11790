/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rr: request/response and connect/request/response/close over TCP.
 *
 *   rr server PORT [COUNT]        answers on COUNT ports (1) from PORT on; a byte with one that
 *                                 tells the port: 'a' for the first, 'b' for the second
 *   rr rr ADDRESS PORT SECONDS    one connection; prints transactions a second, and the time of
 *                                 one, median and 99th percentile, in microseconds
 *   rr crr ADDRESS PORT SECONDS   the same with a new connection for each transaction
 *   rr watch ADDRESS PORT         a new connection each half millisecond; prints when the answer
 *                                 becomes another: nanoseconds (CLOCK_MONOTONIC) and the byte,
 *                                 '-' if there is none within 20 ms; ends with its input
 *
 * ADDRESS/COUNT (IPv4) means COUNT consecutive addresses, of which each connection takes another,
 * as far apart as can be.
 *
 * The server is one thread around epoll, so that both ends can be pinned to one
 * processor. The client closes with a reset (SO_LINGER 0) in crr: no port waits
 * in TIME_WAIT, at either end.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* Of consecutive addresses: a prime, so that all are taken. */
enum { STRIDE = 7919, PATIENCE_MS = 20, PAUSE_NS = 500000 };

struct target {
	struct addrinfo *info;
	uint32_t first, count, at;
};

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void set(int fd, int level, int option)
{
	int one = 1;

	if (setsockopt(fd, level, option, &one, sizeof(one)))
		err(1, "setsockopt");
}

static int listen_on(int port)
{
	struct sockaddr_in6 at = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	int fd = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0);

	set(fd, SOL_SOCKET, SO_REUSEADDR);
	if (bind(fd, (struct sockaddr *)&at, sizeof(at)) || listen(fd, 1024))
		err(1, "port %d", port);
	return fd;
}

static _Noreturn void server(int port, int count)
{
	int poll = epoll_create1(0);

	/* In each event: the descriptor, the place of its port, is it a listener. */
	for (uint64_t place = 0; place < (uint64_t)count; place++) {
		uint64_t fd = listen_on(port + place);
		struct epoll_event event = { .events = EPOLLIN,
					     .data.u64 = fd | place << 32 | 1ull << 48 };

		epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
	}
	for (;;) {
		struct epoll_event ready[64];
		int n = epoll_wait(poll, ready, 64, -1);

		for (int i = 0; i < n; i++) {
			uint64_t data = ready[i].data.u64;
			uint64_t place = data >> 32 & 0xFFFF;
			int fd = (int)data;
			char byte;

			if (data >> 48) {
				int listener = fd;

				while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
					struct epoll_event event = {
						.events = EPOLLIN,
						.data.u64 = (uint32_t)fd | place << 32,
					};

					set(fd, IPPROTO_TCP, TCP_NODELAY);
					epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
				}
				continue;
			}
			if (read(fd, &byte, 1) == 1) {
				byte = 'a' + place;
				if (write(fd, &byte, 1) == 1)
					continue;
			}
			close(fd);	/* end of file or reset */
		}
	}
}

static struct target target_of(char *address, char *port)
{
	struct addrinfo hints = { .ai_flags = AI_NUMERICHOST, .ai_socktype = SOCK_STREAM };
	struct target target = { .count = 1 };
	char *count = strchr(address, '/');

	if (count) {
		*count++ = '\0';
		target.count = strtoul(count, NULL, 10);
	}
	if (getaddrinfo(address, port, &hints, &target.info) || !target.count ||
	    (count && target.info->ai_family != AF_INET))
		errx(2, "not an address and a port: %s %s", address, port);
	target.first = ntohl(((struct sockaddr_in *)target.info->ai_addr)->sin_addr.s_addr);
	return target;
}

static void next(struct target *target)
{
	struct sockaddr_in *to = (struct sockaddr_in *)target->info->ai_addr;

	if (target->count == 1)
		return;
	target->at = (target->at + STRIDE) % target->count;
	to->sin_addr.s_addr = htonl(target->first + target->at);
}

static int dial(struct target *target)
{
	struct timeval patience = { .tv_sec = 3 };
	int fd = socket(target->info->ai_family, SOCK_STREAM, 0);

	if (fd < 0)
		err(1, "socket");
	next(target);
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	if (connect(fd, target->info->ai_addr, target->info->ai_addrlen))
		err(1, "connect");
	set(fd, IPPROTO_TCP, TCP_NODELAY);
	return fd;
}

static void hang_up(int fd)
{
	struct linger reset = { .l_onoff = 1 };

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
	close(fd);
}

static void transact(int fd)
{
	char byte = 'x';

	if (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1)
		err(1, "transaction");
}

static int by_size(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

static void measure(struct target *target, int fd, double seconds)
{
	size_t count = 0, room = 1 << 16;
	uint32_t *times = malloc(room * sizeof(*times));
	uint64_t begin = now(), before = begin, end = begin + seconds * 1e9;

	while (times && before < end) {
		uint64_t after;

		if (fd >= 0) {
			transact(fd);
		} else {
			int one = dial(target);

			transact(one);
			hang_up(one);
		}
		after = now();
		if (count == room)
			times = realloc(times, (room *= 2) * sizeof(*times));
		if (times)
			times[count++] = after - before;
		before = after;
	}
	if (!times || !count)
		errx(1, "no memory, or no time");
	qsort(times, count, sizeof(*times), by_size);
	printf("%.1f %.2f %.2f\n", count * 1e9 / (before - begin), times[count / 2] / 1e3,
	       times[count - 1 - count / 100] / 1e3);
}

/* The byte that a new connection is answered with, or '-'. */
static char answer_of(struct target *target)
{
	struct pollfd wait = { .events = POLLOUT };
	char byte = 'x';
	int fd = socket(target->info->ai_family, SOCK_STREAM | SOCK_NONBLOCK, 0);

	if (fd < 0)
		err(1, "socket");
	next(target);
	wait.fd = fd;
	if ((connect(fd, target->info->ai_addr, target->info->ai_addrlen) && errno != EINPROGRESS) ||
	    poll(&wait, 1, PATIENCE_MS) != 1 || write(fd, &byte, 1) != 1)
		byte = '-';
	wait.events = POLLIN;
	if (byte != '-' && (poll(&wait, 1, PATIENCE_MS) != 1 || read(fd, &byte, 1) != 1))
		byte = '-';
	hang_up(fd);
	return byte;
}

static void watch(struct target *target)
{
	struct pollfd input = { .fd = 0, .events = POLLIN };
	char last = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	while (poll(&input, 1, 0) == 0) {
		struct timespec pause = { .tv_nsec = PAUSE_NS };
		char answer = answer_of(target);

		if (answer != last)
			printf("%llu %c\n", (unsigned long long)now(), answer);
		last = answer;
		nanosleep(&pause, NULL);
	}
}

int main(int argc, char **argv)
{
	struct target target;

	signal(SIGPIPE, SIG_IGN);
	if ((argc == 3 || argc == 4) && !strcmp(argv[1], "server"))
		server(atoi(argv[2]), argc == 4 ? atoi(argv[3]) : 1);
	if (!(argc == 5 && (!strcmp(argv[1], "rr") || !strcmp(argv[1], "crr"))) &&
	    !(argc == 4 && !strcmp(argv[1], "watch")))
		errx(2, "usage: rr server PORT [COUNT] | rr rr|crr ADDRESS[/COUNT] PORT SECONDS"
			" | rr watch ADDRESS PORT");
	target = target_of(argv[2], argv[3]);
	if (!strcmp(argv[1], "watch"))
		watch(&target);
	else
		measure(&target, strcmp(argv[1], "rr") ? -1 : dial(&target), atof(argv[4]));
	return 0;
}
