/*
 * Has the kernel read numbers: the old kstrtoint() says EINVAL to "@", that of the
 * module kstrtoint says EXDEV. A real number must work in both.
 */
#include "result.h"

#include <fcntl.h>
#include <unistd.h>

int main(void)
{
	int fd = open("/proc/self/oom_score_adj", O_WRONLY);

	if (fd < 0)
		cannot_tell("/proc/self/oom_score_adj");
	if (write(fd, "7", 1) != 1)
		cannot_tell("the number 7");
	if (write(fd, "@", 1) == 1) {
		puts("error: @ was taken for a number");
		return UNKNOWN;
	}
	if (errno == EINVAL) {
		puts("flawed: @ is EINVAL, as the old function says");
		return FLAWED;
	}
	if (errno != EXDEV)
		cannot_tell("writing @");
	puts("fixed: @ is EXDEV, as the new function says");
	return FIXED;
}
