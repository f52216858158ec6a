/* Calls sysinfo(), which writes to the kernel's log if it is that of the module printk. */
#include "result.h"

#include <sys/sysinfo.h>

/* The mark that modules/printk.c leaves. */
#define NEW 0x4e50

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
