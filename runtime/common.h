/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* common.h: what the subcommands share: errors, time, joining. */
#ifndef LOCKGATE_COMMON_H
#define LOCKGATE_COMMON_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* Where die() writes: the status pipe for `run`, stderr for the others. */
static int error_fd = STDERR_FILENO;

/* One line "error MESSAGE[: cause]", then exit 1. */
__attribute__((noreturn, format(printf, 1, 2)))
static void die(const char *format, ...)
{
	const char *cause = errno ? strerror(errno) : NULL;
	char message[512];
	va_list args;

	va_start(args, format);
	vsnprintf(message, sizeof(message), format, args);
	va_end(args);
	dprintf(error_fd, "error %s%s%s\n", message, cause ? ": " : "", cause ? cause : "");
	_exit(1);
}

static void *grow(void *memory, size_t size)
{
	void *bigger = realloc(memory, size ? size : 1);

	if (!bigger)
		die("out of memory");
	return bigger;
}

static long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Moves this process into a cgroup v2 directory. */
static void join_cgroup(const char *cgroup)
{
	char path[4096];
	int fd;

	snprintf(path, sizeof(path), "%s/cgroup.procs", cgroup);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, "0", 1) != 1)
		die("cannot join cgroup %s", cgroup);
	close(fd);
}

static int open_namespace(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		die("cannot open namespace %s", path);
	return fd;
}

static void join_namespace(int fd, int type)
{
	if (setns(fd, type) < 0)
		die("cannot join namespace");
	close(fd);
}

/* As many descriptors as the system lets us have. */
static rlim_t raise_descriptors(void)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
		return 1024;
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	getrlimit(RLIMIT_NOFILE, &limit);
	return limit.rlim_cur;
}

static void watch(int poll_fd, int op, int fd, unsigned int events)
{
	struct epoll_event event = { .events = events, .data.fd = fd };

	epoll_ctl(poll_fd, op, fd, &event);
}

#endif
