/* Calls sysinfo(), which warns once if it is that of the module warns. */
#include "result.h"

#include <sys/sysinfo.h>

/* The mark that modules/warns.c leaves. */
#define NEW 0x4e57

int main(void)
{
	struct sysinfo info;

	if (sysinfo(&info))
		cannot_tell("sysinfo");
	if (info.pad != NEW) {
		puts("flawed: sysinfo() is the old one");
		return FLAWED;
	}
	puts("fixed: sysinfo() is the new one");
	return FIXED;
}
