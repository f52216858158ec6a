/*
 * CVE-2026-52928: ioctl(SIOCATMARK) on a Unix socket looks for the mark of
 * out-of-band data, which only stream sockets have. The flawed unix_ioctl
 * answers for a datagram socket too; the fixed one says EOPNOTSUPP.
 */
#include "unprivileged.h"

#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

int main(void)
{
	int fd, mark = -1, ret;

	become_unprivileged();
	fd = socket(AF_UNIX, SOCK_DGRAM, 0);
	if (fd < 0)
		cannot_tell("a Unix datagram socket");
	ret = ioctl(fd, SIOCATMARK, &mark);
	if (ret == 0) {
		printf("flawed: SIOCATMARK on a datagram socket returned 0, mark %d\n", mark);
		return FLAWED;
	}
	if (errno != EOPNOTSUPP)
		cannot_tell("SIOCATMARK on a datagram socket");
	puts("fixed: SIOCATMARK on a datagram socket returned EOPNOTSUPP");
	return FIXED;
}
