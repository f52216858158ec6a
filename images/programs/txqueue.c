/*
 * CVE-2026-98022: a network device takes a transmit queue of any length, but code
 * elsewhere counts it in 16 bits. The fixed dev_change_tx_queue_len says ERANGE
 * above 32767. The length that was there comes back in the end.
 */
#include "result.h"

#include <fcntl.h>
#include <unistd.h>

static const char FILE_NAME[] = "/sys/class/net/lo/tx_queue_len";

static int set_length(const char *length)
{
	int fd = open(FILE_NAME, O_WRONLY);
	int ret, error;

	if (fd < 0)
		cannot_tell(FILE_NAME);
	ret = write(fd, length, strlen(length)) < 0 ? -1 : 0;
	error = errno;
	close(fd);
	errno = error;
	return ret;
}

int main(void)
{
	char before[32] = "";
	int fd = open(FILE_NAME, O_RDONLY);

	if (fd < 0 || read(fd, before, sizeof(before) - 1) <= 0)
		cannot_tell(FILE_NAME);
	close(fd);
	if (set_length("32767"))
		cannot_tell("a queue of length 32767");
	if (set_length("100000") == 0) {
		set_length(before);
		puts("flawed: a queue of length 100000 was taken");
		return FLAWED;
	}
	if (errno != ERANGE)
		cannot_tell("a queue of length 100000");
	if (set_length(before))
		cannot_tell("the length from before");
	puts("fixed: a queue of length 100000 got ERANGE");
	return FIXED;
}
