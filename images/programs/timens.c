/*
 * CVE-2026-93146: a time namespace takes an offset with a negative number of
 * nanoseconds. The fixed proc_timens_set_offset says EINVAL. An offset of whole
 * seconds must work in both. The namespace ends with the program.
 */
#include "result.h"

#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x80
#endif

static int set_offset(const char *offset)
{
	int fd = open("/proc/self/timens_offsets", O_WRONLY);
	int ret;

	if (fd < 0)
		cannot_tell("timens_offsets");
	ret = write(fd, offset, strlen(offset)) < 0 ? -1 : 0;
	close(fd);
	return ret;
}

int main(void)
{
	if (unshare(CLONE_NEWTIME))
		cannot_tell("a time namespace");
	if (set_offset("monotonic 5 0"))
		cannot_tell("an offset of five seconds");
	if (set_offset("monotonic 5 18446744073709551615") == 0) {
		puts("flawed: an offset of -1 nanoseconds was taken");
		return FLAWED;
	}
	if (errno != EINVAL)
		cannot_tell("an offset of -1 nanoseconds");
	puts("fixed: an offset of -1 nanoseconds got EINVAL");
	return FIXED;
}
