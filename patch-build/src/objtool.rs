//! What has make run objtool on an object in the very command that makes the object, so that its note says the whole of how it is made.

use crate::facts::Config;

/// Has objtool run on each object as it is made, and not on those that the build excepts (`OBJECT_FILES_NON_STANDARD`): of the 32-bit
/// vDSO's objects it reads none (scripts/Makefile.build of 6.12).
pub(crate) const AT_ONCE: &str = "objtool-enabled=$(is-standard-object)";
/// The step by which older kernels run it, behind the noted command (scripts/Makefile.build of 5.10; up to 5.16).
const STEP: &str = "$(call cmd,objtool)";
/// The command there.
const COMPILING: &str = "$(CC) $(c_flags) -c -o $@ $<";
/// The same with that step. Where gcc does not record the call sites itself, another step does (before gcc 5): it must not be lost in
/// silence.
const WHOLE: &str = "cmd_cc_o_c=$(CC) $(c_flags) -c -o $@ $< $(if $(strip $(cmd_objtool)),; $(strip $(cmd_objtool)))\
                     $(if $(strip $(cmd_record_mcount)),$(error this compiler does not record call sites of ftrace))";
/// The rule without that step. Nor does it fill in the checksums of exported symbols (`cmd_modversions_c`): they come from
/// `Module.symvers`, and the linker that fills them in would make another object of it.
const RULE: &str = "rule_cc_o_c=$(call cmd_and_fixdep,cc_o_c)";

/// The variables for make's command line that it takes, for a kernel of that configuration and with that `scripts/Makefile.build`.
pub(crate) fn variables(config: &Config, makefile: &str) -> Vec<&'static str> {
    let mut variables = Vec::new();
    // With IBT, objtool would wait for the whole kernel to be linked (scripts/Makefile.lib, delay-objtool).
    if config.enabled("X86_KERNEL_IBT") {
        variables.push(AT_ONCE);
    }
    if has_step(makefile) && defines_command(makefile) {
        variables.extend([WHOLE, RULE]);
    }
    variables
}

/// Whether the rule for C files has that step.
fn has_step(makefile: &str) -> bool {
    let rule = makefile.lines().skip_while(|line| line.trim() != "define rule_cc_o_c");
    rule.take_while(|line| line.trim() != "endef")
        .any(|line| line.trim() == STEP)
}

/// Whether it compiles by the command that is known.
fn defines_command(makefile: &str) -> bool {
    let definitions = makefile.lines().filter_map(|line| line.split_once('='));
    let mut of_rule = definitions.filter(|(name, _)| name.trim() == "cmd_cc_o_c");
    matches!((of_rule.next(), of_rule.next()), (Some((_, command)), None) if command.trim() == COMPILING)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::command;

    /// A rule as older kernels have it, that says what it would run.
    const OLDER: &str = "cmd = $(cmd_$(1))\ncmd_and_fixdep = $(cmd); fixdep $@ '$(cmd_$(1))'\nCC = gcc-10\nc_flags = -O2\n\
        \x20     cmd_cc_o_c = $(CC) $(c_flags) -c -o $@ $<\n\
        cmd_objtool = $(if $(patsubst y%,,$(NOT_$(basename $@))n), \\\n\ttools/objtool/objtool orc $@)\n\
        define rule_cc_o_c\n\t$(call cmd_and_fixdep,cc_o_c)\n\t$(call cmd,checksrc)\n\t$(call cmd,objtool)\n\t$(call cmd,record_mcount)\nendef\n\
        %.o: ; $(rule_cc_o_c)\n";

    fn said(test: &str, makefile: &str) -> Result<String, command::Error> {
        let folder = std::env::temp_dir().join(format!("vmpatch-objtool-{}-{test}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("Makefile"), makefile).unwrap();
        let mut args = vec!["-n"];
        args.extend(variables(&Config::parse(""), makefile));
        args.extend(["NOT_b=y", "a.o", "b.o"]);
        let said = command::output("make", &args, &folder);
        fs::remove_dir_all(&folder).unwrap();
        said.map(|said| String::from_utf8(said).unwrap())
    }

    #[test]
    fn a_kernel_that_runs_objtool_in_a_step_of_its_own_runs_it_in_the_noted_command() {
        let a = "gcc-10 -O2 -c -o a.o  ; tools/objtool/objtool orc a.o";
        let b = "gcc-10 -O2 -c -o b.o  ";
        assert_eq!(
            said("step", OLDER).unwrap(),
            format!("{a}; fixdep a.o '{a}'\n{b}; fixdep b.o '{b}'\n")
        );
    }

    #[test]
    fn call_sites_that_another_step_would_record_are_not_lost_in_silence() {
        let with = OLDER.replace("CC = gcc-10", "CC = gcc-4\ncmd_record_mcount = recordmcount $@");
        let error = said("mcount", &with).unwrap_err();
        assert!(format!("{error:?}").contains("call sites"), "{error:?}");
    }

    #[test]
    fn a_kernel_whose_command_is_whole_or_another_one_keeps_it() {
        let whole = OLDER.replace("-o $@ $<\n", "-o $@ $< ; $(cmd_objtool)\n");
        let without = OLDER.replace("\t$(call cmd,objtool)\n", "");
        for makefile in [whole.as_str(), without.as_str(), ""] {
            assert_eq!(variables(&Config::parse(""), makefile), [""; 0], "{makefile}");
        }
        let ibt = Config::parse("CONFIG_X86_KERNEL_IBT=y\n");
        assert_eq!(variables(&ibt, ""), [AT_ONCE]);
    }
}
