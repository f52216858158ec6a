/*
 * Leaves a task behind that the module exit_tail lets sleep in do_exit(), and says
 * "unlisted" as soon as no list of the kernel names that task.
 */
#include "result.h"

#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

int main(void)
{
	pid_t child;

	/* Nobody waits for the child of a parent that ignores this signal: it leaves the lists at once. */
	signal(SIGCHLD, SIG_IGN);
	child = fork();
	if (child < 0)
		cannot_tell("fork");
	if (!child) {
		prctl(PR_SET_NAME, "exit_tail");
		_exit(0);
	}
	while (!kill(child, 0))
		usleep(1000);
	puts("unlisted");
	return 0;
}
