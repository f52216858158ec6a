/*
 * Compares what the module symbols reports with the kernel's own list. Run it as
 * root: others see no addresses there.
 */
#include "result.h"

#include <sys/sysinfo.h>

/* The mark that modules/symbols.c leaves. */
#define NEW 0x4e53

/* The address of the kernel's nth function of that name, modules left out. */
static unsigned long nth(const char *wanted, int n)
{
	unsigned long address, found = 0;
	char line[512], name[256], module[256];
	FILE *list = fopen("/proc/kallsyms", "r");

	if (!list)
		cannot_tell("/proc/kallsyms");
	while (n && fgets(line, sizeof(line), list)) {
		int fields = sscanf(line, "%lx %*c %255s %255s", &address, name, module);

		if (fields != 2 || strcmp(name, wanted))
			continue;
		found = address;
		n--;
	}
	fclose(list);
	return n ? 0 : found;
}

int main(void)
{
	unsigned long second = nth("c_start", 2), third = nth("c_start", 3);
	struct sysinfo info;

	if (sysinfo(&info))
		cannot_tell("sysinfo");
	if (info.pad != NEW) {
		puts("flawed: sysinfo() is the old one");
		return FLAWED;
	}
	if (info.totalhigh != second || info.freehigh != third || !second || info.totalram < 1) {
		printf("error: c_start is at %#lx and %#lx, not at %#lx and %#lx; threads %lu\n",
		       info.totalhigh, info.freehigh, second, third, info.totalram);
		return UNKNOWN;
	}
	printf("fixed: both c_start are right; threads %lu\n", info.totalram);
	return FIXED;
}
