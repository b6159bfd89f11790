/* SPDX-License-Identifier: Apache-2.0 */
/* The first process of a pod's or node's process namespace: holds it, and reaps. */
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void end(int signal)
{
	(void)signal;
	_exit(0);
}

int main(void)
{
	sigset_t child;

	signal(SIGTERM, end);
	signal(SIGINT, end);
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	sigprocmask(SIG_BLOCK, &child, NULL);
	for (int which;;) {
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
		sigwait(&child, &which);
	}
}
