/*
 * Holds many tasks that sleep: processes of some threads each.
 *
 *   tasks N   starts N threads, says "sleeping", and ends them at SIGTERM
 */
#include "result.h"

#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#define THREADS_PER_PROCESS 100
/* What a thread that only sleeps needs; the least that pthreads takes. */
#define STACK_BYTES 16384

static void *sleep_on(void *unused)
{
	for (;;)
		pause();
	return unused;
}

static void hold(int threads)
{
	pthread_attr_t small;
	pthread_t thread;
	int i;

	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, STACK_BYTES);
	for (i = 1; i < threads; i++)
		if (pthread_create(&thread, &small, sleep_on, NULL))
			_exit(UNKNOWN);
}

int main(int argc, char **argv)
{
	int wanted = argc == 2 ? atoi(argv[1]) : 0;

	while (wanted > 0) {
		int threads = wanted < THREADS_PER_PROCESS ? wanted : THREADS_PER_PROCESS;
		int ready[2];
		pid_t child;
		char byte;

		if (pipe(ready))
			cannot_tell("pipe");
		child = fork();
		if (child < 0)
			cannot_tell("fork");
		if (!child) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			hold(threads);
			if (write(ready[1], "", 1) != 1)
				_exit(UNKNOWN);
			sleep_on(NULL);
		}
		/* A process that could not start its threads is gone: this pipe's only other end is ours. */
		close(ready[1]);
		if (read(ready[0], &byte, 1) != 1)
			cannot_tell("threads");
		close(ready[0]);
		wanted -= threads;
	}
	puts("sleeping");
	fflush(stdout);
	sleep_on(NULL);
	return 0;
}
