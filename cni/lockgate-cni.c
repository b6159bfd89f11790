/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lockgate-cni: the CNI plugin as the container runtime sees it.
 *
 * It decides nothing. It opens the pod's network namespace, which only the host's mounts can
 * reach, and hands everything to the agent on a unix socket; the agent's answer is its own.
 *
 *   to the agent    each CNI_* variable as NAME=VALUE\0, an empty record \0, then all of stdin;
 *                   with the first bytes, if CNI_NETNS can be opened, its descriptor (SCM_RIGHTS);
 *                   the end of the request is the end of the stream
 *   from the agent  one digit, the exit code, then what goes to stdout; the last byte is \n,
 *                   so that a cut answer is known as one
 *
 * Without an agent it says "try again later" (CNI error 11), "not available" for STATUS (50),
 * and still tells VERSION. LOCKGATE_CNI_SOCKET names another socket: several agents on one
 * machine, tests.
 *
 * Static, so that it runs on hosts that have no libc of ours, or none at all.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define SOCKET "/run/lockgate/cni.sock"
#define PATIENCE 120	/* seconds; the agent gives up by itself well before */
#define VERSIONS "\"supportedVersions\":[\"0.4.0\",\"1.0.0\",\"1.1.0\"]"

extern char **environ;

static const char *variable(const char *name)
{
	const char *value = getenv(name);

	return value ? value : "";
}

/* What is to be said without the agent; returns the exit code. */
static int alone(const char *what, int error)
{
	const char *command = variable("CNI_COMMAND");

	if (!strcmp(command, "VERSION")) {
		puts("{\"cniVersion\":\"1.1.0\"," VERSIONS "}");
		return 0;
	}
	printf("{\"cniVersion\":\"1.0.0\",\"code\":%d,\"msg\":\"%s\",\"details\":\"%s: %s\"}\n",
	       strcmp(command, "STATUS") ? 11 : 50, "the Lockgate agent does not answer",
	       what, strerror(error));
	return 1;
}

static int dial(void)
{
	const char *path = variable("LOCKGATE_CNI_SOCKET");
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct timeval patience = { .tv_sec = PATIENCE };
	int wire = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (wire < 0)
		return -1;
	if (!*path)
		path = SOCKET;
	if (strlen(path) >= sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	strcpy(address.sun_path, path);
	setsockopt(wire, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	setsockopt(wire, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	return connect(wire, (struct sockaddr *)&address, sizeof(address)) ? -1 : wire;
}

/* All of it; a descriptor goes with the first byte if `fd` is one. */
static int give(int wire, const char *data, size_t length, int fd)
{
	char control[CMSG_SPACE(sizeof(int))] = { 0 };

	while (length) {
		struct iovec part = { (void *)data, length };
		struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };
		ssize_t sent;

		if (fd >= 0) {
			struct cmsghdr *head = (struct cmsghdr *)control;

			message.msg_control = control;
			message.msg_controllen = sizeof(control);
			*head = (struct cmsghdr){ CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS };
			memcpy(CMSG_DATA(head), &fd, sizeof(int));
		}
		sent = sendmsg(wire, &message, MSG_NOSIGNAL);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0)
			return -1;
		data += sent;
		length -= sent;
		fd = -1;
	}
	return 0;
}

static int ask(int wire)
{
	int netns = open(variable("CNI_NETNS"), O_RDONLY | O_CLOEXEC);
	char data[65536];
	ssize_t length;

	for (char **one = environ; *one; one++) {
		if (strncmp(*one, "CNI_", 4))
			continue;
		if (give(wire, *one, strlen(*one) + 1, netns))
			return -1;
		netns = -1;
	}
	if (give(wire, "", 1, netns))
		return -1;
	while ((length = read(0, data, sizeof(data))) > 0)
		if (give(wire, data, length, -1))
			return -1;
	return length < 0 ? -1 : shutdown(wire, SHUT_WR);
}

int main(void)
{
	static char answer[1 << 20];
	size_t length = 0;
	ssize_t got;
	int wire = dial();

	if (wire < 0)
		return alone("connecting to its socket", errno);
	if (ask(wire))
		return alone("sending the request", errno);
	while ((got = recv(wire, answer + length, sizeof(answer) - length, 0)) > 0)
		length += got;
	if (got < 0 || length < 2 || answer[length - 1] != '\n')
		return alone("reading the answer", got < 0 ? errno : ECONNRESET);
	fwrite(answer + 1, 1, length - (length > 2 ? 1 : 2), stdout);
	return fflush(stdout) ? 1 : answer[0] - '0';
}
