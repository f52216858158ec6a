/*
 * CVE-2026-99236: an event filter that ends in the middle (`a == 1 &&`) is taken,
 * and its last operator leads nowhere. The fixed process_preds says EINVAL. A
 * whole filter must work in both; in the end there is none again.
 */
#include "result.h"

#include <fcntl.h>
#include <unistd.h>

static int set_filter(const char *filter)
{
	static const char name[] = "/sys/kernel/tracing/events/sched/sched_switch/filter";
	int fd = open(name, O_WRONLY);
	int ret, error;

	if (fd < 0)
		cannot_tell(name);
	ret = write(fd, filter, strlen(filter)) < 0 ? -1 : 0;
	error = errno;
	close(fd);
	errno = error;
	return ret;
}

int main(void)
{
	int ret, error;

	if (set_filter("common_pid == 1 && common_pid == 1"))
		cannot_tell("a whole filter");
	ret = set_filter("common_pid == 1 &&");
	error = errno;
	if (set_filter("0"))
		cannot_tell("no filter");
	if (ret == 0) {
		puts("flawed: a filter that ends with && was taken");
		return FLAWED;
	}
	errno = error;
	if (error != EINVAL)
		cannot_tell("a filter that ends with &&");
	puts("fixed: a filter that ends with && got EINVAL");
	return FIXED;
}
