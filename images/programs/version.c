/*
 * Calls sysinfo() and says which version of the module version answers.
 *
 *   version                one call; says whether getppid() is the module's, too
 *   version load TASKS     that many tasks do nothing else until SIGTERM; prints
 *                          "started", and in the end how often each version has
 *                          answered, 0 being the kernel's own function, and how
 *                          many calls gave no result
 */
#include "result.h"

#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>
#include <unistd.h>

/* As modules/version.c has them. */
#define MARK 0x7663
#define PARENT 40000

#define VERSIONS 4
#define BEGUN VERSIONS

static unsigned long version(void)
{
	struct sysinfo info;

	if (sysinfo(&info))
		cannot_tell("sysinfo");
	if (info.pad != MARK)
		return 0;
	if (info.totalram == 0 || info.totalram >= VERSIONS)
		cannot_tell("the version");
	return info.totalram;
}

static volatile sig_atomic_t ended;

static void end(int signal)
{
	(void)signal;
	ended = 1;
}

static int load(int tasks)
{
	struct sigaction action = { .sa_handler = end };
	_Atomic unsigned long *totals;
	unsigned long lost;
	int i;

	totals = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (totals == MAP_FAILED)
		cannot_tell("shared memory");
	sigaction(SIGTERM, &action, NULL);
	for (i = 0; i < tasks; i++) {
		pid_t pid = fork();

		if (pid < 0)
			cannot_tell("fork");
		while (pid == 0 && !ended) {
			totals[BEGUN]++;
			totals[version()]++;
		}
		if (pid == 0)
			_exit(0);
	}
	puts("started");
	fflush(stdout);
	while (!ended)
		sleep(1);
	signal(SIGTERM, SIG_IGN);
	kill(0, SIGTERM);
	while (wait(NULL) > 0)
		;
	lost = totals[BEGUN];
	for (i = 0; i < VERSIONS; i++) {
		printf("v%d %lu ", i, totals[i]);
		lost -= totals[i];
	}
	printf("lost %lu\n", lost);
	return lost ? FLAWED : FIXED;
}

int main(int argc, char **argv)
{
	unsigned long found;

	if (argc == 3 && !strcmp(argv[1], "load")) {
		setpgid(0, 0);
		return load(atoi(argv[2]));
	}
	found = version();
	printf("v%lu, getppid %s\n", found, syscall(SYS_getppid) > PARENT ? "replaced" : "own");
	return found ? FIXED : FLAWED;
}
