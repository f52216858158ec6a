/*
 * CVE-2026-53249: setsockopt(IP_OPTIONS) lets any user set a loose source
 * route, which needs CAP_NET_RAW everywhere else. The fixed ip_options_get says
 * EPERM. A record-route option needs no privilege and must work in both.
 */
#include "unprivileged.h"

#include <netinet/in.h>
#include <netinet/ip.h>
#include <sys/socket.h>

/* An option with room for one address, its pointer on that address, and an end. */
static int set_option(int fd, unsigned char type)
{
	unsigned char option[8] = { type, 7, 4, 127, 0, 0, 1, IPOPT_EOL };

	return setsockopt(fd, IPPROTO_IP, IP_OPTIONS, option, sizeof(option));
}

int main(void)
{
	int fd;

	become_unprivileged();
	fd = socket(AF_INET, SOCK_DGRAM, 0);
	if (fd < 0)
		cannot_tell("an IPv4 datagram socket");
	if (set_option(fd, IPOPT_RR))
		cannot_tell("IP_OPTIONS with record route, which any user may set");
	if (set_option(fd, IPOPT_LSRR) == 0) {
		puts("flawed: IP_OPTIONS with a loose source route returned 0");
		return FLAWED;
	}
	if (errno != EPERM)
		cannot_tell("IP_OPTIONS with a loose source route");
	puts("fixed: IP_OPTIONS with a loose source route returned EPERM");
	return FIXED;
}
