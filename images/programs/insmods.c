/*
 * Loads and unloads modules, as fast as the kernel does it.
 *
 *   insmods FILE…   each file's name, less ".ko", is the module's
 */
#include "rounds.h"

#include <fcntl.h>
#include <sys/syscall.h>

#define NAME_MAX_LEN 64

static char **files;

static void name_of(const char *file, char *name)
{
	const char *last = strrchr(file, '/');
	size_t i, len;

	last = last ? last + 1 : file;
	len = strcspn(last, ".");
	if (len >= NAME_MAX_LEN)
		len = NAME_MAX_LEN - 1;
	for (i = 0; i < len; i++)
		name[i] = last[i] == '-' ? '_' : last[i];
	name[len] = 0;
}

static void load_and_unload(void)
{
	char name[NAME_MAX_LEN];
	char **file;

	for (file = files; *file; file++) {
		int fd = open(*file, O_RDONLY | O_CLOEXEC);

		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
			is_wrong(*file);
		close(fd);
		name_of(*file, name);
		if (syscall(SYS_delete_module, name, O_NONBLOCK))
			is_wrong(name);
	}
}

int main(int argc, char **argv)
{
	if (argc < 2)
		return UNKNOWN;
	files = argv + 1;
	repeat(load_and_unload);
	return say_rounds();
}
