/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * lockgate-pod: a pod without a container runtime.
 *
 *   lockgate-pod run                       a pod, see below
 *   lockgate-pod probe [--cgroup PATH] [--netns PATH] [--concurrency N]   see probe.h
 *   lockgate-pod exec [--cgroup PATH] --pid PID -- COMMAND...             in a running pod
 *   lockgate-pod answer tcp/PORT|udp/PORT...   on ports with the host's name; what a container
 *                                          without a command does, for other runtimes' containers
 *
 * `run` reads a description on stdin: records "KEY VALUE", each ended by a zero
 * byte, closed by an empty record. Records after "init" or "container" belong
 * to that container. Values may hold anything but the zero byte.
 *
 *   name N | hostname N | cgroup PATH | hosts PATH | log PATH | netns PATH |
 *   restart Always|OnFailure|Never | grace MS | backoff MS | init N | container N
 *   of a container: arg A | env K=V | cwd PATH | log PATH | tcp PORT | udp PORT
 *
 * It makes the pod's namespaces, says "ready PID" and waits: nothing of the pod
 * runs before the line "go", so that network and policy are there first. Then
 * init containers one by one, then the containers. "stop MS" on stdin, SIGTERM,
 * or stdin closing before "go" ends it.
 *
 * Lines on stdout: ready PID · started NAME · exited NAME CODE · backoff NAME MS ·
 * running (every container was started; its ports are bound) · succeeded · failed ·
 * error MESSAGE.
 *
 * Two processes: the one that was started stays outside, passes SIGTERM on and
 * ends with the pod's exit code; the pod's PID 1 dies with it.
 */
#include "common.h"
#include "probe.h"
#include "serve.h"

#include <getopt.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>

#define MAX_PORTS      64
#define BACKOFF_MAX_MS 300000	/* as the kubelet: doubles up to five minutes, */
#define BACKOFF_FORGET 600000	/* and starts again after ten good ones */

struct list {
	char **items;		/* ends with NULL */
	size_t count;
};

struct container {
	const char *name, *cwd, *log;
	struct list arguments, environment;
	struct port ports[MAX_PORTS];
	size_t port_count;
	bool init, over;
	int code;
	pid_t pid;		/* 0 = not running */
	long started, due, backoff;
};

static struct {
	const char *name, *hostname, *cgroup, *hosts, *log, *netns, *restart;
	long grace, backoff;
	struct container *containers;
	size_t count;
	bool go, announced;
	long stop_by;		/* 0 = not stopping */
} pod = { .log = "/dev/null", .restart = "Always", .grace = 30000, .backoff = 1000 };

/* ---- The description ------------------------------------------------------------ */

static void append(struct list *list, char *item)
{
	list->items = grow(list->items, (list->count + 2) * sizeof(char *));
	list->items[list->count++] = item;
	list->items[list->count] = NULL;
}

static void add_container(const char *name, bool init)
{
	struct container *added;

	pod.containers = grow(pod.containers, (pod.count + 1) * sizeof(*added));
	added = &pod.containers[pod.count++];
	memset(added, 0, sizeof(*added));
	added->name = name;
	added->init = init;
}

static void add_port(struct container *container, int type, const char *number)
{
	if (container->port_count == MAX_PORTS)
		die("container %s declares more than %d ports", container->name, MAX_PORTS);
	container->ports[container->port_count++] =
		(struct port){ .type = type, .number = atoi(number), .fd = -1 };
}

static bool describe_container(struct container *container, const char *key, char *value)
{
	if (!strcmp(key, "arg"))
		append(&container->arguments, value);
	else if (!strcmp(key, "env"))
		append(&container->environment, value);
	else if (!strcmp(key, "cwd"))
		container->cwd = value;
	else if (!strcmp(key, "log"))
		container->log = value;
	else if (!strcmp(key, "tcp"))
		add_port(container, SOCK_STREAM, value);
	else if (!strcmp(key, "udp"))
		add_port(container, SOCK_DGRAM, value);
	else
		return false;
	return true;
}

static bool describe_pod(const char *key, char *value)
{
	static const struct { const char *key, **field; } texts[] = {
		{ "name", &pod.name }, { "hostname", &pod.hostname }, { "cgroup", &pod.cgroup },
		{ "hosts", &pod.hosts }, { "log", &pod.log }, { "netns", &pod.netns },
		{ "restart", &pod.restart },
	};

	for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
		if (!strcmp(key, texts[i].key)) {
			*texts[i].field = value;
			return true;
		}
	}
	if (!strcmp(key, "grace"))
		pod.grace = atol(value);
	else if (!strcmp(key, "backoff"))
		pod.backoff = atol(value);
	else if (!strcmp(key, "init") || !strcmp(key, "container"))
		add_container(value, key[0] == 'i');
	else
		return false;
	return true;
}

/* Reads up to the empty record. The text stays allocated: the fields point in. */
static void read_description(void)
{
	char *text = NULL, *record;
	size_t size = 0;

	do {	/* byte-wise pipes are fine here: a description is a few hundred bytes */
		if (size % 4096 == 0)
			text = grow(text, size + 4096);
		errno = 0;
		if (read(STDIN_FILENO, text + size, 1) != 1)
			die("the description ends without an empty record");
		size++;
	} while (text[size - 1] || (size > 1 && text[size - 2]));
	for (record = text; *record; ) {
		char *next = record + strlen(record) + 1, *value = strchr(record, ' ');
		bool known = false;

		if (value) {
			*value++ = 0;
			known = pod.count && describe_container(&pod.containers[pod.count - 1],
								record, value);
			known = known || describe_pod(record, value);
		}
		if (!known)
			die("unknown record '%s'", record);
		record = next;
	}
	if (!pod.name)
		die("the description has no name");
}

/* ---- The sandbox ---------------------------------------------------------------- */

static void bring_loopback_up(void)
{
	struct ifreq request = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) < 0)
		die("cannot bring lo up");
	close(fd);
}

/* Runs as PID 1 of the new pid namespace. */
static void make_sandbox(void)
{
	const char *hostname = pod.hostname ?: pod.name;

	if (pod.netns)
		join_namespace(open_namespace(pod.netns), CLONE_NEWNET);
	if (unshare(CLONE_NEWNS | CLONE_NEWUTS | (pod.netns ? 0 : CLONE_NEWNET)) < 0)
		die("cannot unshare");
	if (!pod.netns)
		bring_loopback_up();
	if (sethostname(hostname, strlen(hostname)) < 0)
		die("cannot set hostname %s", hostname);
	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
		die("cannot make mounts private");
	if (mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0)
		die("cannot mount /proc");
	if (pod.hosts && mount(pod.hosts, "/etc/hosts", NULL, MS_BIND, NULL) < 0)
		die("cannot bind %s over /etc/hosts", pod.hosts);
}

/* ---- Containers ----------------------------------------------------------------- */

__attribute__((noreturn))
static void become(struct container *container)
{
	int log = open(container->log ?: pod.log, O_WRONLY | O_CREAT | O_APPEND, 0644);
	int nothing = open("/dev/null", O_RDONLY | O_CLOEXEC);
	static char *no_environment[] = { NULL };
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	setsid();
	dup2(nothing, STDIN_FILENO);
	dup2(log < 0 ? open("/dev/null", O_WRONLY) : log, STDOUT_FILENO);
	dup2(STDOUT_FILENO, STDERR_FILENO);
	error_fd = STDERR_FILENO;
	if (log > STDERR_FILENO)
		close(log);

	environ = container->environment.items ?: no_environment;
	if (container->cwd && chdir(container->cwd) < 0)
		die("cannot enter %s", container->cwd);
	if (container->arguments.count) {
		execvp(container->arguments.items[0], container->arguments.items);
		dprintf(STDERR_FILENO, "cannot run %s: %s\n", container->arguments.items[0],
			strerror(errno));
		_exit(errno == ENOENT ? 127 : 126);
	}
	for (size_t i = 0; i < container->port_count; i++) {
		if (container->ports[i].fd < 0) {
			errno = -container->ports[i].fd;
			die("cannot listen on port %d", container->ports[i].number);
		}
	}
	serve(pod.name, container->ports, container->port_count);
}

/* Ports are bound here, before the child runs: "running" promises them. */
static void start(struct container *container)
{
	bool serves = !container->arguments.count;

	for (size_t i = 0; serves && i < container->port_count; i++) {
		struct port *port = &container->ports[i];

		if (!open_port(port)) {
			int cause = errno;

			if (port->fd >= 0)
				close(port->fd);
			port->fd = -cause;	/* for the child to tell in its log */
		}
	}
	container->started = now_ms();
	container->pid = fork();
	if (container->pid == 0)
		become(container);
	for (size_t i = 0; serves && i < container->port_count; i++)
		if (container->ports[i].fd >= 0)
			close(container->ports[i].fd);
	if (container->pid < 0) {
		container->pid = 0;
		container->due = now_ms() + pod.backoff;
		return;
	}
	printf("started %s\n", container->name);
}

/* The kubelet's rule; an init container of an Always pod is retried until it succeeds. */
static bool restarts(const struct container *container)
{
	if (!strcmp(pod.restart, "Always") && !container->init)
		return true;
	return strcmp(pod.restart, "Never") && container->code;
}

static void ended(struct container *container, int status)
{
	container->pid = 0;
	container->code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
	printf("exited %s %d\n", container->name, container->code);
	if (pod.stop_by)
		return;
	if (!restarts(container)) {
		container->over = true;
		return;
	}
	if (!container->backoff || now_ms() - container->started > BACKOFF_FORGET)
		container->backoff = pod.backoff;
	container->due = now_ms() + container->backoff;
	printf("backoff %s %ld\n", container->name, container->backoff);
	container->backoff *= 2;
	if (container->backoff > BACKOFF_MAX_MS)
		container->backoff = BACKOFF_MAX_MS;
}

static void reap(void)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		for (size_t i = 0; i < pod.count; i++)
			if (pod.containers[i].pid == pid)
				ended(&pod.containers[i], status);
}

/* ---- The pod's life ------------------------------------------------------------- */

__attribute__((noreturn))
static void finish(const char *word, int code)
{
	if (word)
		printf("%s\n", word);
	fflush(stdout);
	_exit(code);	/* the kernel kills what is left in our pid namespace */
}

static void stop(long grace)
{
	if (pod.stop_by)
		return;
	pod.stop_by = now_ms() + grace;
	for (size_t i = 0; i < pod.count; i++)
		if (pod.containers[i].pid)
			kill(pod.containers[i].pid, SIGTERM);
}

/* Starts what is due. Returns when there is nothing more to do now. */
static void advance(void)
{
	bool alive = false, failed = false, all_started = true;

	if (pod.stop_by) {
		for (size_t i = 0; i < pod.count; i++)
			alive |= pod.containers[i].pid != 0;
		if (!alive || now_ms() >= pod.stop_by)
			finish(NULL, 0);
		return;
	}
	if (!pod.go)
		return;
	for (int init = 1; init >= 0; init--) {
		for (size_t i = 0; i < pod.count; i++) {
			struct container *container = &pod.containers[i];

			if (container->init != init)
				continue;
			if (!container->over && !container->pid && now_ms() >= container->due)
				start(container);
			all_started &= container->started != 0;
			alive |= !container->over;
			failed |= container->over && container->code;
			if (init && (alive || failed))
				break;
		}
		if (init && failed)
			finish("failed", 1);
		if (init && alive)
			return;
	}
	if (all_started && !pod.announced) {
		pod.announced = true;
		printf("running\n");
	}
	if (!alive)
		finish(failed ? "failed" : "succeeded", failed);
}

/* Milliseconds until advance() has something to do; -1 = never by itself. */
static int next_due(void)
{
	long due = pod.stop_by;

	for (size_t i = 0; pod.go && !pod.stop_by && i < pod.count; i++) {
		struct container *container = &pod.containers[i];

		if (!container->pid && !container->over && container->due > now_ms() &&
		    (!due || container->due < due))
			due = container->due;
	}
	if (!due)
		return -1;
	return due > now_ms() ? due - now_ms() : 0;
}

/* Commands on stdin: false once it is closed. */
static bool obey(void)
{
	static char line[64];
	static size_t size;
	ssize_t got = read(STDIN_FILENO, line + size, sizeof(line) - 1 - size);
	char *end;

	if (got <= 0) {
		if (!pod.go)
			stop(0);
		return false;
	}
	size += got;
	line[size] = 0;
	while ((end = strchr(line, '\n'))) {
		*end = 0;
		if (!strcmp(line, "go"))
			pod.go = true;
		else if (!strncmp(line, "stop ", 5))
			stop(atol(line + 5));
		size -= end + 1 - line;
		memmove(line, end + 1, size + 1);
	}
	if (size == sizeof(line) - 1)
		size = 0;	/* no command is that long */
	return true;
}

__attribute__((noreturn))
static void live(int signals)
{
	struct pollfd ready[2] = {
		{ .fd = signals, .events = POLLIN }, { .fd = STDIN_FILENO, .events = POLLIN },
	};

	for (;;) {
		struct signalfd_siginfo signal;

		advance();
		fflush(stdout);
		poll(ready, 2, next_due());
		if (ready[0].revents && read(signals, &signal, sizeof(signal)) == sizeof(signal) &&
		    signal.ssi_signo != SIGCHLD)
			stop(pod.grace);
		reap();
		if (ready[1].revents && !obey())
			ready[1].fd = -1;
	}
}

static int run(void)
{
	int made[2], status, number;
	sigset_t signals;
	pid_t first;
	char byte;

	error_fd = STDOUT_FILENO;
	read_description();
	if (pod.cgroup)
		join_cgroup(pod.cgroup);
	sigemptyset(&signals);
	sigaddset(&signals, SIGCHLD);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	sigprocmask(SIG_BLOCK, &signals, NULL);
	signal(SIGPIPE, SIG_IGN);
	if (pipe2(made, O_CLOEXEC) < 0 || unshare(CLONE_NEWPID) < 0 || (first = fork()) < 0)
		die("cannot make the pod's first process");
	if (first == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(made[0]);
		make_sandbox();
		if (write(made[1], "", 1) != 1)
			_exit(1);	/* the outer process is gone */
		close(made[1]);
		live(signalfd(-1, &signals, SFD_CLOEXEC));
	}
	close(made[1]);
	if (read(made[0], &byte, 1) == 1) {
		printf("ready %d\n", first);
		fflush(stdout);
	}
	while (waitpid(first, &status, WNOHANG) == 0)
		if (sigwait(&signals, &number) == 0 && number != SIGCHLD)
			kill(first, SIGTERM);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* ---- exec ----------------------------------------------------------------------- */

static int exec_in(const char *pid, const char *cgroup, char **command)
{
	static const struct { const char *name; int type; } kinds[] = {
		{ "net", CLONE_NEWNET }, { "uts", CLONE_NEWUTS },
		{ "pid", CLONE_NEWPID }, { "mnt", CLONE_NEWNS },
	};
	int namespaces[4], status;
	char path[64];
	pid_t child;

	for (int i = 0; i < 4; i++) {
		snprintf(path, sizeof(path), "/proc/%s/ns/%s", pid, kinds[i].name);
		namespaces[i] = open_namespace(path);
	}
	if (cgroup)
		join_cgroup(cgroup);
	for (int i = 0; i < 4; i++)
		join_namespace(namespaces[i], kinds[i].type);
	child = fork();		/* a pid namespace is entered by children only */
	if (child < 0)
		die("cannot fork");
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		execvp(command[0], command);
		status = errno == ENOENT ? 127 : 126;
		dprintf(STDERR_FILENO, "lockgate: cannot run %s: %s\n", command[0], strerror(errno));
		_exit(status);
	}
	while (waitpid(child, &status, 0) < 0 && errno == EINTR)
		;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static void leave(int number)
{
	(void)number;
	_exit(0);
}

static int answer(char **words, size_t count)
{
	struct port ports[MAX_PORTS];
	char name[256];

	if (!count || count > MAX_PORTS || gethostname(name, sizeof(name)) < 0)
		return 2;
	/* The first process of a container gets no signal that it does not handle. */
	signal(SIGTERM, leave);
	signal(SIGINT, leave);
	for (size_t i = 0; i < count; i++) {
		bool tcp = !strncmp(words[i], "tcp/", 4);

		ports[i].type = tcp ? SOCK_STREAM : SOCK_DGRAM;
		ports[i].number = atoi(words[i] + 4);
		if ((!tcp && strncmp(words[i], "udp/", 4)) || ports[i].number < 1 ||
		    ports[i].number > 65535) {
			fprintf(stderr, "%s: expected tcp/PORT or udp/PORT\n", words[i]);
			return 2;
		}
		if (!open_port(&ports[i]))
			die("cannot listen on %s", words[i]);
	}
	serve(name, ports, count);
	return 0;
}

int main(int count, char **words)
{
	static const struct option options[] = {
		{ "cgroup", required_argument, NULL, 'c' },
		{ "netns", required_argument, NULL, 'n' },
		{ "pid", required_argument, NULL, 'p' },
		{ "concurrency", required_argument, NULL, 'l' },
		{ NULL, 0, NULL, 0 },
	};
	const char *verb = count > 1 ? words[1] : "", *cgroup = NULL, *netns = NULL, *pid = NULL;
	long limit = 512;
	int option;

	optind = 2;
	while (count > 1 && (option = getopt_long(count, words, "+", options, NULL)) != -1) {
		if (option == 'c')
			cgroup = optarg;
		else if (option == 'n')
			netns = optarg;
		else if (option == 'p')
			pid = optarg;
		else if (option == 'l' && atol(optarg) > 0)
			limit = atol(optarg);
		else
			return 2;
	}
	if (!strcmp(verb, "run"))
		return run();
	if (!strcmp(verb, "probe"))
		return probe(cgroup, netns, limit);
	if (!strcmp(verb, "exec") && pid && optind < count)
		return exec_in(pid, cgroup, words + optind);
	if (!strcmp(verb, "answer") && optind < count)
		return answer(words + optind, count - optind);
	fprintf(stderr, "usage: lockgate-pod run | probe [--cgroup PATH] [--netns PATH] [--concurrency N]"
			" | exec [--cgroup PATH] --pid PID -- COMMAND... | answer tcp/PORT|udp/PORT...\n");
	return 2;
}
