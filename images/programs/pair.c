/*
 * Calls sysinfo() and says whether the functions of the module pair are old or
 * new, or a mix of both, which must never be.
 *
 *   pair                     one call
 *   pair load SECONDS TASKS  that many tasks do nothing else for so long, or until
 *                            SIGTERM, if SECONDS is 0; the status is 0 unless a
 *                            call found a mix, or was lost: it began and gave no
 *                            result
 *   pair rusage SECONDS TASKS  the same with getrusage() and the module rusage_pair
 */
#include "result.h"

#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>
#include <unistd.h>

/* The marks that modules/pair.c leaves. */
#define NEW_CALLER 0x4e43
#define NEW_CALLEE 0x4e4557UL
#define PAGE 4096UL

enum { OLD, NEW, MIXED, BEGUN };
static const char *const kind_names[] = { "old", "new", "mixed" };

static int one_call(struct sysinfo *info)
{
	if (sysinfo(info))
		cannot_tell("sysinfo");
	if (info->pad == NEW_CALLER)
		return info->bufferram == NEW_CALLEE && !info->totalhigh && !info->freehigh ? NEW : MIXED;
	/* The old caller gives pages as bytes. */
	return info->bufferram == NEW_CALLEE * PAGE ? MIXED : OLD;
}

static int one_rusage(void)
{
	struct rusage usage;

	if (getrusage(RUSAGE_SELF, &usage))
		cannot_tell("getrusage");
	if (usage.ru_maxrss == NEW_CALLER)
		return usage.ru_ixrss || usage.ru_idrss ? MIXED : NEW;
	return usage.ru_utime.tv_sec == (long)NEW_CALLEE ? MIXED : OLD;
}

static int say(const struct sysinfo *info, int kind)
{
	static const int status[] = { FLAWED, FIXED, UNKNOWN };

	if (kind == MIXED)
		printf("mixed: mark of the caller %#x, of the callee %#lx, old callees %lu, old callers %lu\n",
		       info->pad, info->bufferram, info->totalhigh, info->freehigh);
	else
		printf("%s: both functions are %s\n", kind == NEW ? "fixed" : "flawed", kind_names[kind]);
	return status[kind];
}

static volatile sig_atomic_t ended;

static void end(int signal)
{
	(void)signal;
	ended = 1;
}

static void call_until_the_end(_Atomic unsigned long *totals, int rusage)
{
	struct sysinfo info;

	while (!ended) {
		totals[BEGUN]++;
		totals[rusage ? one_rusage() : one_call(&info)]++;
	}
	_exit(0);
}

static int load(unsigned int seconds, int tasks, int rusage)
{
	struct sigaction action = { .sa_handler = end };
	_Atomic unsigned long *totals;
	unsigned long lost;
	int i;

	totals = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (totals == MAP_FAILED)
		cannot_tell("shared memory");
	sigaction(SIGTERM, &action, NULL);
	sigaction(SIGALRM, &action, NULL);
	for (i = 0; i < tasks; i++) {
		pid_t pid = fork();

		if (pid < 0)
			cannot_tell("fork");
		if (pid == 0)
			call_until_the_end(totals, rusage);
	}
	puts("started");
	fflush(stdout);
	alarm(seconds);
	while (!ended)
		sleep(1); /* not pause(), which a patch of the storms replaces */
	signal(SIGTERM, SIG_IGN);
	kill(0, SIGTERM);
	while (wait(NULL) > 0)
		;
	lost = totals[BEGUN] - totals[OLD] - totals[NEW] - totals[MIXED];
	printf("old %lu new %lu mixed %lu lost %lu\n", totals[OLD], totals[NEW], totals[MIXED], lost);
	return totals[MIXED] || lost ? FLAWED : FIXED;
}

int main(int argc, char **argv)
{
	struct sysinfo info;

	int rusage = argc == 4 && !strcmp(argv[1], "rusage");

	if (rusage || (argc == 4 && !strcmp(argv[1], "load"))) {
		setpgid(0, 0);
		return load(atoi(argv[2]), atoi(argv[3]), rusage);
	}
	return say(&info, one_call(&info));
}
