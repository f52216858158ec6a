/*
 * Runs out of memory: a task takes more and more of it until the kernel kills it.
 * Each page has its own contents, and is checked as long as there is time.
 */
#include "rounds.h"

#include <fcntl.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define CHUNK (1UL << 20)
#define PAGE 4096UL
/* The one that the kernel takes first. */
#define VICTIM "1000"

static void choose_me(void)
{
	int fd = open("/proc/self/oom_score_adj", O_WRONLY);

	if (fd < 0 || write(fd, VICTIM, sizeof(VICTIM) - 1) < 0)
		_exit(UNKNOWN);
	close(fd);
}

static void take_all(void)
{
	unsigned long chunk, at;

	choose_me();
	for (chunk = 0;; chunk++) {
		char *memory = mmap(NULL, CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (memory == MAP_FAILED)
			_exit(UNKNOWN);
		for (at = 0; at < CHUNK; at += PAGE)
			*(volatile uint64_t *)(memory + at) = (uintptr_t)memory + at;
		for (at = 0; at < CHUNK; at += PAGE)
			if (*(volatile uint64_t *)(memory + at) != (uintptr_t)memory + at)
				_exit(FLAWED);
	}
}

static void run_out(void)
{
	pid_t pid = fork();
	int status;

	if (pid < 0)
		return is_wrong("fork");
	if (!pid)
		take_all();
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return is_wrong("waitpid");
	if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
		is_wrong("the task that takes all memory was not killed");
}

int main(void)
{
	repeat(run_out);
	return say_rounds();
}
