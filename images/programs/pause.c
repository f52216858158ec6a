/*
 * Calls pause(), which returns at a signal: EINTR from the old function,
 * EOPNOTSUPP from that of the module pause.
 *
 *   pause        the signal comes by itself, soon
 *   pause sleep  says "sleeping", and sleeps until SIGUSR1
 */
#include "result.h"

#include <signal.h>
#include <sys/time.h>
#include <unistd.h>

/* Again and again, for the first one may come before the sleep. */
#define SOON_US 50000

static void nothing(int signal)
{
	(void)signal;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = nothing };
	struct itimerval soon = { { 0, SOON_US }, { 0, SOON_US } };

	sigaction(SIGUSR1, &action, NULL);
	sigaction(SIGALRM, &action, NULL);
	if (argc == 2 && !strcmp(argv[1], "sleep")) {
		puts("sleeping");
		fflush(stdout);
	} else if (setitimer(ITIMER_REAL, &soon, NULL)) {
		cannot_tell("a timer");
	}
	pause();
	if (errno == EINTR) {
		puts("flawed: pause() returned EINTR, as the old one does");
		return FLAWED;
	}
	if (errno != EOPNOTSUPP)
		cannot_tell("pause");
	puts("fixed: pause() returned EOPNOTSUPP, as the new one does");
	return FIXED;
}
