/*
 * CVE-2026-52972: a request to the kernel's crypto may say that it has 2 GiB of
 * associated data, which overflows later sums. The fixed af_alg_sendmsg says
 * EINVAL. Needs the modules algif_skcipher, ecb and aes_generic.
 */
#include "unprivileged.h"

#include <linux/if_alg.h>
#include <sys/socket.h>

static int send_with(int fd, unsigned int length)
{
	char control[CMSG_SPACE(4) * 2] = "", data[16] = "";
	struct iovec vector = { data, sizeof(data) };
	struct msghdr message = {
		.msg_iov = &vector, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control),
	};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	unsigned int operation = ALG_OP_ENCRYPT;

	header->cmsg_level = SOL_ALG;
	header->cmsg_type = ALG_SET_OP;
	header->cmsg_len = CMSG_LEN(4);
	memcpy(CMSG_DATA(header), &operation, 4);
	header = CMSG_NXTHDR(&message, header);
	header->cmsg_level = SOL_ALG;
	header->cmsg_type = ALG_SET_AEAD_ASSOCLEN;
	header->cmsg_len = CMSG_LEN(4);
	memcpy(CMSG_DATA(header), &length, 4);
	return sendmsg(fd, &message, 0);
}

/* A new request each time: what was sent stays in it. */
static int request(void)
{
	struct sockaddr_alg address = {
		.salg_family = AF_ALG, .salg_type = "skcipher", .salg_name = "ecb(aes)",
	};
	int fd = socket(AF_ALG, SOCK_SEQPACKET, 0);

	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) ||
	    setsockopt(fd, SOL_ALG, ALG_SET_KEY, "0123456789abcdef", 16))
		cannot_tell("ecb(aes) of the kernel");
	fd = accept(fd, NULL, 0);
	if (fd < 0)
		cannot_tell("a request to ecb(aes)");
	return fd;
}

int main(void)
{
	int ret;

	become_unprivileged();
	if (send_with(request(), 0x7fffffff) != 16)
		cannot_tell("a request with an associated length below 2 GiB");
	ret = send_with(request(), 0x80000000u);
	if (ret >= 0) {
		printf("flawed: a request with an associated length of 2 GiB returned %d\n", ret);
		return FLAWED;
	}
	if (errno != EINVAL)
		cannot_tell("a request with an associated length of 2 GiB");
	puts("fixed: a request with an associated length of 2 GiB returned EINVAL");
	return FIXED;
}
