/*
 * readlink() into a buffer of 77 bytes: the patched vfs_readlink answers how
 * many bytes a variable of the kernel has, which it counts up to its end. The
 * kernel's own says how long the link is.
 */
#include "result.h"

#include <unistd.h>

/* sysctl_protected_symlinks of fs/namei.c */
#define VARIABLE_BYTES 4

int main(void)
{
	char name[] = "/tmp/readlink-XXXXXX", buffer[77];
	const char target[] = "a link of some length";
	ssize_t found;

	if (!mkdtemp(name) || rmdir(name) || symlink(target, name))
		cannot_tell("a link");
	found = readlink(name, buffer, sizeof(buffer));
	unlink(name);
	if (found == VARIABLE_BYTES) {
		puts("fixed: a variable of 4 bytes");
		return FIXED;
	}
	if (found != (ssize_t)strlen(target)) {
		printf("%zd: ", found);
		cannot_tell("readlink");
	}
	puts("flawed: the link's length");
	return FLAWED;
}
