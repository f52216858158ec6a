/*
 * What every program of a storm agrees on: it says "started", does its round
 * again and again until SIGTERM, and ends with "rounds N wrong N". The status is
 * 0 where nothing was wrong. What went wrong first is a line before that.
 */
#ifndef ROUNDS_H
#define ROUNDS_H

#include "result.h"

#include <signal.h>
#include <unistd.h>

static volatile sig_atomic_t ended;
static unsigned long rounds, wrong;

static void end(int signal)
{
	(void)signal;
	ended = 1;
}

/* Counts what the kernel should not have done; the first of it is told. */
static void is_wrong(const char *what)
{
	if (!wrong++)
		printf("wrong: %s: %s\n", what, strerror(errno));
}

static void repeat(void (*round)(void))
{
	struct sigaction action = { .sa_handler = end };

	if (sigaction(SIGTERM, &action, NULL))
		cannot_tell("sigaction");
	puts("started");
	fflush(stdout);
	while (!ended) {
		round();
		rounds++;
	}
}

static int say_rounds(void)
{
	printf("rounds %lu wrong %lu\n", rounds, wrong);
	return wrong ? FLAWED : FIXED;
}

#endif
