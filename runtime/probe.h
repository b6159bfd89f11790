/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * probe.h: tries many addresses at once from inside a pod.
 *
 * Questions, one a line:  ID tcp|udp ADDRESS PORT TIMEOUT_MS
 * Answers, as they come:  ID SOURCE_PORT RESULT, which is
 *     ok FIRST_LINE | refused | timeout | unreachable | error NAME
 * The source port is 0 where none was taken.
 *
 * "ok" means that bytes came back, never only that a handshake succeeded. The
 * question we send is an HTTP request, which every kind of server answers
 * somehow; of an HTTP answer the first line of the body is told.
 */
#ifndef LOCKGATE_PROBE_H
#define LOCKGATE_PROBE_H

#include "common.h"

static const char probe_request[] = "GET / HTTP/1.0\r\n\r\n";

struct attempt {
	char id[64];
	bool tcp;
	bool connected;
	int fd;			/* -1: over, or not begun */
	unsigned int port;	/* our own */
	struct sockaddr_storage to;
	long timeout, due;
	size_t size;
	char got[2048];
};

static bool parse_attempt(const char *line, struct attempt *attempt)
{
	struct sockaddr_in6 *to6 = (struct sockaddr_in6 *)&attempt->to;
	struct sockaddr_in *to4 = (struct sockaddr_in *)&attempt->to;
	char protocol[8], address[64];
	int port;

	memset(attempt, 0, sizeof(*attempt));
	attempt->fd = -1;
	if (sscanf(line, "%63s %7s %63s %d %ld", attempt->id, protocol, address, &port,
		   &attempt->timeout) != 5)
		return false;
	attempt->tcp = !strcmp(protocol, "tcp");
	if (!attempt->tcp && strcmp(protocol, "udp"))
		return false;
	if (inet_pton(AF_INET6, address, &to6->sin6_addr) == 1) {
		to6->sin6_family = AF_INET6;
		to6->sin6_port = htons(port);
		return true;
	}
	to4->sin_family = AF_INET;
	to4->sin_port = htons(port);
	return inet_pton(AF_INET, address, &to4->sin_addr) == 1;
}

static void conclude(struct attempt *attempt, const char *result, const char *detail)
{
	printf("%s %u %s%s%s\n", attempt->id, attempt->port, result, *detail ? " " : "", detail);
	if (attempt->fd >= 0)
		close(attempt->fd);
	attempt->fd = -1;
}

static void fail_attempt(struct attempt *attempt, int error)
{
	if (error == ECONNREFUSED)
		conclude(attempt, "refused", "");
	else if (error == ETIMEDOUT)
		conclude(attempt, "timeout", "");
	else if (error == EHOSTUNREACH || error == ENETUNREACH)
		conclude(attempt, "unreachable", "");
	else
		conclude(attempt, "error", strerrorname_np(error) ?: "UNKNOWN");
}

/* The first line that means something: of the body when it is HTTP with one. */
static void conclude_ok(struct attempt *attempt)
{
	char *line = attempt->got, *body = strstr(line, "\r\n\r\n");

	if (!strncmp(line, "HTTP/", 5) && body && body[4])
		line = body + 4;
	line[strcspn(line, "\r\n")] = 0;
	conclude(attempt, "ok", line);
}

static bool answer_complete(const struct attempt *attempt)
{
	const char *body = strstr(attempt->got, "\r\n\r\n");

	if (!attempt->tcp || attempt->size == sizeof(attempt->got) - 1)
		return true;
	if (!strncmp(attempt->got, "HTTP/", attempt->size < 5 ? attempt->size : 5))
		return body && strchr(body + 4, '\n');
	return strchr(attempt->got, '\n');
}

static unsigned int port_of(int fd)
{
	struct sockaddr_in6 own = {};	/* the port lies where IPv4 has it */
	socklen_t size = sizeof(own);

	return getsockname(fd, (struct sockaddr *)&own, &size) < 0 ? 0 : ntohs(own.sin6_port);
}

static void begin_attempt(struct attempt *attempt, int poll_fd, unsigned int index)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLOUT, .data.u32 = index };
	int type = (attempt->tcp ? SOCK_STREAM : SOCK_DGRAM) | SOCK_NONBLOCK | SOCK_CLOEXEC;
	socklen_t size = attempt->to.ss_family == AF_INET6 ? sizeof(struct sockaddr_in6)
							   : sizeof(struct sockaddr_in);

	attempt->due = now_ms() + attempt->timeout;
	attempt->fd = socket(attempt->to.ss_family, type, 0);
	if (attempt->fd < 0 ||
	    (connect(attempt->fd, (struct sockaddr *)&attempt->to, size) < 0 &&
	     errno != EINPROGRESS)) {
		fail_attempt(attempt, errno);
		return;
	}
	attempt->port = port_of(attempt->fd);
	epoll_ctl(poll_fd, EPOLL_CTL_ADD, attempt->fd, &event);
}

static void send_request(struct attempt *attempt, int poll_fd, unsigned int index)
{
	struct epoll_event event = { .events = EPOLLIN, .data.u32 = index };
	socklen_t size = sizeof(int);
	int error = 0;

	getsockopt(attempt->fd, SOL_SOCKET, SO_ERROR, &error, &size);
	if (error) {
		fail_attempt(attempt, error);
		return;
	}
	attempt->connected = true;
	if (send(attempt->fd, probe_request, sizeof(probe_request) - 1, MSG_NOSIGNAL) < 0) {
		fail_attempt(attempt, errno);
		return;
	}
	epoll_ctl(poll_fd, EPOLL_CTL_MOD, attempt->fd, &event);
}

static void read_answer(struct attempt *attempt)
{
	ssize_t size = recv(attempt->fd, attempt->got + attempt->size,
			    sizeof(attempt->got) - 1 - attempt->size, 0);

	if (size < 0) {
		if (errno != EAGAIN)
			fail_attempt(attempt, errno);
		return;
	}
	attempt->size += size;
	attempt->got[attempt->size] = 0;
	if (attempt->size == 0)
		conclude(attempt, "error", "EOF");
	else if (size == 0 || answer_complete(attempt))
		conclude_ok(attempt);
}

static int probe_all(struct attempt *attempts, size_t count, size_t limit)
{
	size_t first = 0, next = 0, running = 0;	/* all before `first` are over */
	int poll_fd = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event ready[256];

	while (first < count) {
		long now = now_ms(), wait = 60000;
		int found;

		while (next < count && running < limit) {
			begin_attempt(&attempts[next], poll_fd, next);
			running += attempts[next++].fd >= 0;
		}
		while (first < next && attempts[first].fd < 0)
			first++;
		for (size_t i = first; i < next; i++) {
			if (attempts[i].fd < 0)
				continue;
			if (attempts[i].due <= now) {
				if (attempts[i].size)
					conclude_ok(&attempts[i]);
				else
					conclude(&attempts[i], "timeout", attempts[i].tcp &&
						 attempts[i].connected ? "connected" : "");
				running--;
				wait = 0;
			} else if (attempts[i].due - now < wait) {
				wait = attempts[i].due - now;
			}
		}
		fflush(stdout);
		if (!running)
			continue;
		found = epoll_wait(poll_fd, ready, 256, wait);
		for (int i = 0; i < found; i++) {
			unsigned int index = ready[i].data.u32;
			struct attempt *attempt = &attempts[index];

			if (attempt->fd < 0)
				continue;
			if (attempt->connected)
				read_answer(attempt);
			else
				send_request(attempt, poll_fd, index);
			running -= attempt->fd < 0;
		}
	}
	fflush(stdout);
	return 0;
}

static int probe(const char *cgroup, const char *netns, size_t limit)
{
	struct attempt *attempts = NULL;
	size_t count = 0, room = 0, most;
	char line[256];

	if (netns)
		join_namespace(open_namespace(netns), CLONE_NEWNET);
	if (cgroup)
		join_cgroup(cgroup);
	most = raise_descriptors() - 16;
	while (fgets(line, sizeof(line), stdin)) {
		if (count == room) {
			room = room * 2 + 64;
			attempts = grow(attempts, room * sizeof(*attempts));
		}
		if (!parse_attempt(line, &attempts[count++])) {
			errno = 0;
			line[strcspn(line, "\n")] = 0;
			die("not ID tcp|udp ADDRESS PORT TIMEOUT_MS: '%s'", line);
		}
	}
	return probe_all(attempts, count, limit < most ? limit : most);
}

#endif
