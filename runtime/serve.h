/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * serve.h: what answers on the ports of a container without a command.
 *
 * TCP: an HTTP request gets "200 OK" with the pod's name; any other bytes, or
 * silence for SILENCE_MS, get the name alone. We close after the client does,
 * so that it holds the TIME_WAIT. UDP: every datagram is answered with the
 * name, from the address it was sent to.
 */
#ifndef LOCKGATE_SERVE_H
#define LOCKGATE_SERVE_H

#include "common.h"

#define SILENCE_MS   50
#define IDLE_MS      60000
#define SERVED_FDS   65536	/* descriptors beyond this are refused */

struct port {
	int type;		/* SOCK_STREAM or SOCK_DGRAM */
	int number;
	int fd;
};

enum served_kind { FREE = 0, LISTENER, DATAGRAMS, SILENT, ANSWERED };

struct served {			/* by descriptor */
	enum served_kind kind;
	unsigned int serial;	/* tells a connection from its predecessor on the fd */
	long seen;
};

/* Connections that have said nothing yet, oldest first. */
struct silent {
	int fd;
	unsigned int serial;
	long due;
};

static struct served served[SERVED_FDS];
static struct silent silence[SERVED_FDS];
static unsigned int silence_head, silence_tail;	/* free running, modulo SERVED_FDS */

/* Opens and binds; both families on one socket, IPv4 alone without IPv6. */
static bool open_port(struct port *port)
{
	struct sockaddr_in6 any6 = { .sin6_family = AF_INET6, .sin6_port = htons(port->number) };
	struct sockaddr_in any4 = { .sin_family = AF_INET, .sin_port = htons(port->number) };
	int on = 1, off = 0, bound;

	port->fd = socket(AF_INET6, port->type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (port->fd >= 0) {
		setsockopt(port->fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
		setsockopt(port->fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
		setsockopt(port->fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof(on));
		bound = bind(port->fd, (struct sockaddr *)&any6, sizeof(any6));
		if (bound < 0 && errno != EADDRINUSE) {
			close(port->fd);
			port->fd = -1;
		}
	}
	if (port->fd < 0) {
		port->fd = socket(AF_INET, port->type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
		if (port->fd < 0)
			return false;
		setsockopt(port->fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
		setsockopt(port->fd, IPPROTO_IP, IP_PKTINFO, &on, sizeof(on));
		bound = bind(port->fd, (struct sockaddr *)&any4, sizeof(any4));
	}
	return bound == 0 && (port->type == SOCK_DGRAM || listen(port->fd, 4096) == 0);
}

/* The control message of the datagram names the address it came to; sent back
 * it names the source. The interface is left to the routes. */
static void free_interface(struct msghdr *message)
{
	struct cmsghdr *part;

	for (part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
		if (part->cmsg_level == IPPROTO_IPV6 && part->cmsg_type == IPV6_PKTINFO)
			((struct in6_pktinfo *)CMSG_DATA(part))->ipi6_ifindex = 0;
		else if (part->cmsg_level == IPPROTO_IP && part->cmsg_type == IP_PKTINFO)
			((struct in_pktinfo *)CMSG_DATA(part))->ipi_ifindex = 0;
	}
}

static void answer_datagrams(int fd, const char *answer)
{
	char question[2048], control[256];
	struct sockaddr_storage from;

	for (;;) {
		struct iovec data = { question, sizeof(question) };
		struct msghdr message = {
			.msg_name = &from, .msg_namelen = sizeof(from),
			.msg_iov = &data, .msg_iovlen = 1,
			.msg_control = control, .msg_controllen = sizeof(control),
		};

		if (recvmsg(fd, &message, 0) < 0) {
			if (errno == EAGAIN)
				return;
			continue;	/* an ICMP error of an earlier answer */
		}
		free_interface(&message);
		data.iov_base = (void *)answer;
		data.iov_len = strlen(answer);
		message.msg_flags = 0;
		sendmsg(fd, &message, MSG_NOSIGNAL);
	}
}

static void forget(int fd)
{
	served[fd].kind = FREE;
	close(fd);
}

static void accept_all(int poll_fd, int listener)
{
	int fd;

	while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
		struct served *client = &served[fd % SERVED_FDS];

		if (fd >= SERVED_FDS || silence_tail - silence_head == SERVED_FDS) {
			close(fd);
			continue;
		}
		client->kind = SILENT;
		client->serial++;
		client->seen = now_ms();
		silence[silence_tail++ % SERVED_FDS] =
			(struct silent){ fd, client->serial, client->seen + SILENCE_MS };
		watch(poll_fd, EPOLL_CTL_ADD, fd, EPOLLIN);
	}
}

static bool is_http(const char *bytes)
{
	static const char *const methods[] = { "GET ", "HEAD", "POST", "PUT ", "DELE", "OPTI", "PATC" };

	for (size_t i = 0; i < sizeof(methods) / sizeof(methods[0]); i++)
		if (!strncmp(bytes, methods[i], 4))
			return true;
	return false;
}

static void answer_client(int fd, const char *answer, bool http)
{
	char reply[1024];
	int size = http ? snprintf(reply, sizeof(reply),
				   "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
				   "Content-Length: %zu\r\nConnection: close\r\n\r\n%s",
				   strlen(answer), answer)
			: snprintf(reply, sizeof(reply), "%s", answer);

	if (send(fd, reply, size, MSG_NOSIGNAL) < 0) {
		forget(fd);
		return;
	}
	if (http)
		shutdown(fd, SHUT_WR);
	served[fd].kind = ANSWERED;
}

/* Reads all there is: the first bytes decide the answer, the rest is ignored. */
static void read_client(int fd, const char *answer)
{
	char bytes[16384];
	ssize_t size;

	served[fd].seen = now_ms();
	while ((size = recv(fd, bytes, sizeof(bytes) - 1, 0)) > 0) {
		bytes[size] = 0;
		if (served[fd].kind == SILENT)
			answer_client(fd, answer, is_http(bytes));
		if (served[fd].kind == FREE)
			return;
	}
	if (size == 0 && served[fd].kind == SILENT)
		answer_client(fd, answer, false);
	if (served[fd].kind != FREE && (size == 0 || errno != EAGAIN))
		forget(fd);
}

/* Answers those who waited long enough; milliseconds until the next is due. */
static int answer_silent(const char *answer)
{
	while (silence_head != silence_tail) {
		struct silent *oldest = &silence[silence_head % SERVED_FDS];
		struct served *client = &served[oldest->fd];

		if (client->kind == SILENT && client->serial == oldest->serial) {
			long wait = oldest->due - now_ms();

			if (wait > 0)
				return wait;
			answer_client(oldest->fd, answer, false);
		}
		silence_head++;
	}
	return -1;
}

static void close_idle(long now)
{
	for (int fd = 0; fd < SERVED_FDS; fd++)
		if (served[fd].kind >= SILENT && now - served[fd].seen > IDLE_MS)
			forget(fd);
}

/* Serves the bound ports for ever. */
__attribute__((noreturn))
static void serve(const char *pod, struct port *ports, size_t count)
{
	long sweep = now_ms() + IDLE_MS;
	int poll_fd = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event ready[256];
	char answer[300];

	raise_descriptors();
	snprintf(answer, sizeof(answer), "%s\n", pod);
	for (size_t i = 0; i < count; i++) {
		served[ports[i].fd].kind = ports[i].type == SOCK_STREAM ? LISTENER : DATAGRAMS;
		watch(poll_fd, EPOLL_CTL_ADD, ports[i].fd, EPOLLIN);
	}
	for (;;) {
		int wait = answer_silent(answer);
		int found = epoll_wait(poll_fd, ready, 256, wait < 0 ? IDLE_MS : wait);

		for (int i = 0; i < found; i++) {
			int fd = ready[i].data.fd;

			if (served[fd].kind == LISTENER)
				accept_all(poll_fd, fd);
			else if (served[fd].kind == DATAGRAMS)
				answer_datagrams(fd, answer);
			else if (served[fd].kind != FREE)
				read_client(fd, answer);
		}
		if (now_ms() >= sweep) {
			close_idle(now_ms());
			sweep = now_ms() + IDLE_MS / 10;
		}
	}
}

#endif
