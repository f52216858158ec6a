/* Calls sysinfo(), which lets the kernel call it later if it is that of the module outlives. */
#include "sysinfo.h"

int main(void)
{
	return see_sysinfo(0x4e4c);
}
