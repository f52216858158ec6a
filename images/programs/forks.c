/*
 * Makes tasks that end at once, and waits for each: processes that end in every
 * way there is, processes that run another program, and threads.
 */
#include "rounds.h"

#include <pthread.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#define STATUS 7

extern char **environ;

/* Threads of the last process, some of which still run when it ends. */
static void *linger(void *unused)
{
	usleep(100);
	return unused;
}

static void child(unsigned long turn)
{
	char *again[] = { "/proc/self/exe", "end", NULL };
	pthread_t thread;
	int i;

	switch (turn % 4) {
	case 0:
		_exit(STATUS);
	case 1:
		execve(again[0], again, environ);
		_exit(UNKNOWN);
	case 2:
		for (i = 0; i < 4; i++)
			pthread_create(&thread, NULL, linger, NULL);
		_exit(STATUS);
	default:
		kill(getpid(), SIGKILL);
		pause();
	}
}

static void fork_and_wait(void)
{
	pid_t pid = fork();
	int status;

	if (pid < 0)
		return is_wrong("fork");
	if (!pid)
		child(rounds);
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return is_wrong("waitpid");
	if (rounds % 4 == 3 ? !WIFSIGNALED(status) : !WIFEXITED(status) || WEXITSTATUS(status) != STATUS)
		is_wrong("how a task ended");
}

int main(int argc, char **argv)
{
	(void)argv;
	if (argc == 2)
		return STATUS;
	repeat(fork_and_wait);
	return say_rounds();
}
