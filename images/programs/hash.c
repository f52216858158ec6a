/*
 * AF_ALG: the patched hash_sendmsg says EBADMSG to 77 bytes, the kernel's own
 * takes them. Of any other length both give the same digest.
 */
#include "result.h"

#include <linux/if_alg.h>
#include <sys/socket.h>
#include <unistd.h>

static const unsigned char OF_ABC[] = { 0xba, 0x78, 0x16, 0xbf };

int main(void)
{
	struct sockaddr_alg address = {
		.salg_family = AF_ALG, .salg_type = "hash", .salg_name = "sha256",
	};
	unsigned char digest[32], bytes[77] = { 0 };
	int fd = socket(AF_ALG, SOCK_SEQPACKET, 0);

	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)))
		cannot_tell("a hash");
	fd = accept(fd, NULL, 0);
	if (fd < 0 || send(fd, "abc", 3, 0) != 3 || read(fd, digest, 32) != 32)
		cannot_tell("a digest");
	if (memcmp(digest, OF_ABC, sizeof(OF_ABC))) {
		puts("error: another digest");
		return UNKNOWN;
	}
	if (send(fd, bytes, sizeof(bytes), 0) == sizeof(bytes)) {
		puts("flawed: 77 bytes were taken");
		return FLAWED;
	}
	if (errno != EBADMSG)
		cannot_tell("77 bytes");
	puts("fixed: 77 bytes were not taken");
	return FIXED;
}
