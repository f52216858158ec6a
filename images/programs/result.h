/*
 * What every test program agrees on: one line on standard output, then an exit
 * status that says the same thing.
 *
 *   0  the kernel behaves as it does with the fix, or with the new function
 *   1  the kernel shows the flaw, or the old function
 *   2  neither: the program could not find out, or what it found is wrong
 */
#ifndef RESULT_H
#define RESULT_H

#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { FIXED = 0, FLAWED = 1, UNKNOWN = 2 };

static void cannot_tell(const char *what)
{
	printf("error: %s: %s\n", what, strerror(errno));
	exit(UNKNOWN);
}

#endif
