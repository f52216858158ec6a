/* Calls sysinfo(), which warns at its first call if it is that of the module warns. */
#include "sysinfo.h"

int main(void)
{
	return see_sysinfo(0x4e57);
}
