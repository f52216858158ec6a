/*
 * CVE-2026-53236: setsockopt(SO_ATTACH_FILTER) on a TCP socket lets any user
 * shorten segments behind TCP's back. The fixed sk_setsockopt says EPERM without
 * CAP_NET_ADMIN. A filter on a UDP socket needs no privilege and must work in both.
 */
#include "unprivileged.h"

#include <linux/filter.h>
#include <sys/socket.h>

static int attach(int type)
{
	struct sock_filter accept_all = { BPF_RET | BPF_K, 0, 0, 0xffff };
	struct sock_fprog program = { 1, &accept_all };
	int fd = socket(AF_INET, type, 0);

	if (fd < 0)
		cannot_tell("an IPv4 socket");
	return setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof(program));
}

int main(void)
{
	become_unprivileged();
	if (attach(SOCK_DGRAM))
		cannot_tell("SO_ATTACH_FILTER on a UDP socket, which any user may do");
	if (attach(SOCK_STREAM) == 0) {
		puts("flawed: SO_ATTACH_FILTER on a TCP socket returned 0");
		return FLAWED;
	}
	if (errno != EPERM)
		cannot_tell("SO_ATTACH_FILTER on a TCP socket");
	puts("fixed: SO_ATTACH_FILTER on a TCP socket returned EPERM");
	return FIXED;
}
