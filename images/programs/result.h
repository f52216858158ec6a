/*
 * What every test program agrees on: one line on standard output, then an exit
 * status that says the same thing.
 *
 *   0  the kernel behaves as it does with the fix
 *   1  the kernel shows the flaw
 *   2  the program could not find out
 */
#ifndef RESULT_H
#define RESULT_H

#define _GNU_SOURCE
#include <errno.h>
#include <grp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { FIXED = 0, FLAWED = 1, UNKNOWN = 2 };

/* The flaws are in the reach of any user, so the programs are not root. */
#define NOBODY 65534

static void cannot_tell(const char *what)
{
	printf("error: %s: %s\n", what, strerror(errno));
	exit(UNKNOWN);
}

static void become_unprivileged(void)
{
	if (geteuid() != 0)
		return;
	if (setgroups(0, NULL) || setresgid(NOBODY, NOBODY, NOBODY) ||
	    setresuid(NOBODY, NOBODY, NOBODY))
		cannot_tell("giving up root");
}

#endif
