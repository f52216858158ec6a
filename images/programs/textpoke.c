/*
 * CVE-2026-98655: perf_event_open lets any user see every change of the kernel's
 * code (text_poke) as long as the event excludes the kernel. The fixed one says
 * EACCES where the kernel is not to be watched (perf_event_paranoid is 2 here;
 * what it was comes back in the end). The same event without it works in both.
 */
#include "unprivileged.h"

#include <fcntl.h>
#include <linux/perf_event.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static const char PARANOID[] = "/proc/sys/kernel/perf_event_paranoid";

static void write_paranoid(const char *value)
{
	int fd = open(PARANOID, O_WRONLY);

	if (fd < 0 || write(fd, value, strlen(value)) < 0)
		cannot_tell(PARANOID);
	close(fd);
}

static int open_event(int text_poke)
{
	struct perf_event_attr event = {
		.type = PERF_TYPE_SOFTWARE, .size = sizeof(event),
		.config = PERF_COUNT_SW_DUMMY, .exclude_kernel = 1, .text_poke = text_poke,
	};

	return syscall(SYS_perf_event_open, &event, 0, -1, -1, 0);
}

static int unprivileged(void)
{
	become_unprivileged();
	if (open_event(0) < 0)
		cannot_tell("an event of this program itself");
	if (open_event(1) >= 0) {
		puts("flawed: an event with text_poke was opened by any user");
		return FLAWED;
	}
	if (errno != EACCES)
		cannot_tell("an event with text_poke");
	puts("fixed: an event with text_poke got EACCES");
	return FIXED;
}

int main(void)
{
	char before[16] = "";
	int fd = open(PARANOID, O_RDONLY), status;
	pid_t child;

	if (fd < 0 || read(fd, before, sizeof(before) - 1) <= 0)
		cannot_tell(PARANOID);
	close(fd);
	write_paranoid("2");
	child = fork();
	if (child == 0)
		exit(unprivileged());
	if (child < 0 || waitpid(child, &status, 0) != child)
		cannot_tell("a process");
	write_paranoid(before);
	return WIFEXITED(status) ? WEXITSTATUS(status) : UNKNOWN;
}
