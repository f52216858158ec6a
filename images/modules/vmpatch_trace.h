/* A trace event, in a header as the kernel's own macros read it: several times. */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM vmpatch_test

#if !defined(VMPATCH_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define VMPATCH_TRACE_H

#include <linux/tracepoint.h>

TRACE_DEFINE_ENUM(VMPATCH_TEST_ODD);

TRACE_EVENT(vmpatch_test,
	TP_PROTO(int number),
	TP_ARGS(number),
	TP_STRUCT__entry(__field(int, number)),
	TP_fast_assign(__entry->number = number;),
	TP_printk("%d %s", __entry->number,
		  __print_symbolic(__entry->number & 1, { VMPATCH_TEST_ODD, "odd" }))
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE vmpatch_trace
#include <trace/define_trace.h>
