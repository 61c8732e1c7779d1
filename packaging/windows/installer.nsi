; Windows installer, made with makensis: see packages.py, one folder up, for the defines.
;
;   VERSION  such as 5.2.0          FOLDER  the compiled program's folder
;   SHAWL    the service wrapper    OUTPUT  the installer to write
;
; Silent, for the first installation:
;   installer.exe /S /BASE_URL=... /CLIENT_ID=... /AGENT_ID=... /CLIENT_SECRET=...
;   installer.exe /S /CONFIG=C:\path\agent.properties     keeps the secret out of the list of processes; or agent.toml
; Silent, over an installed one: installer.exe /S           its settings are kept, unless /CONFIG names others
; Uninstall: uninstall.exe [/S] [/PURGE]                    /PURGE deletes settings, waiting messages and logs as well
; For the .msi that carries this installer (medplum-agent.wxs): /MSI leaves the entry in the list of programs to it;
; /UNINSTALL [/PURGE] uninstalls what is installed, and waits.
;
; Exit codes: 0 done; 1 cancelled; 2 values are missing or a step failed, and what was there before is there again; 3 a
; first installation whose service does not run. What was done is in medplum-agent-install.log in the data folder.

Unicode true
Target amd64-unicode
SetCompressor /SOLID lzma
RequestExecutionLevel admin
ShowInstDetails nevershow ; nothing that a person types may be seen there
ManifestSupportedOS all

!include MUI2.nsh
!include FileFunc.nsh
!include LogicLib.nsh
!include nsDialogs.nsh

!define SERVICE "MedplumAgent"
!define UNINSTALL_KEY "Software\Microsoft\Windows\CurrentVersion\Uninstall\MedplumAgent"
!define EVENT_KEY "SYSTEM\CurrentControlSet\Services\EventLog\Application\Medplum Agent"
!define SYSTEM_ACCOUNTS '/grant:r "*S-1-5-18:(OI)(CI)F" "*S-1-5-32-544:(OI)(CI)F"' ; SYSTEM and Administrators
; The service's own account has no password and no rights; Windows derives the number from the service's name.
!define SERVICE_ACCOUNT "NT SERVICE\${SERVICE}"
!define SERVICE_SID "*S-1-5-80-1599949213-4244642004-4128910914-3783484773-41160728"
!define FIREWALL_RULE "Medplum Agent"
; Of the service control manager's interface
!define SC_MANAGER_ALL 0xF003F
!define SERVICE_ALL 0xF01FF
!define NO_CHANGE 0xFFFFFFFF
!define STOPPED 1
!define RUNNING 4
!define REPARSE_POINT 0x400

Name "Medplum Agent"
OutFile "${OUTPUT}"
InstallDir "$PROGRAMFILES64\Medplum Agent"
VIProductVersion "${VERSION}.0"
VIAddVersionKey ProductName "Medplum Agent"
VIAddVersionKey FileDescription "Medplum Agent installer"
VIAddVersionKey FileVersion "${VERSION}"
VIAddVersionKey ProductVersion "${VERSION}"
VIAddVersionKey LegalCopyright "Apache-2.0"

Var BaseUrl
Var ClientId
Var ClientSecret
Var AgentId
Var ConfigFile
Var StateDir
Var Field1
Var Field2
Var Field3
Var Field4
Var Purge
Var Account ; that the service logs on as, as icacls names it
Var Existed ; yes: the service was there before
Var WasRunning
Var Msi

!define MUI_FINISHPAGE_TITLE "Medplum Agent is installed"
!define MUI_FINISHPAGE_TEXT "The service Medplum Agent runs and starts with Windows.$\r$\n$\r$\nIts logs are in $StateDir."
Page custom AskValues TakeValues
!insertmacro MUI_PAGE_INSTFILES
!insertmacro MUI_PAGE_FINISH
!insertmacro MUI_UNPAGE_CONFIRM
!insertmacro MUI_UNPAGE_INSTFILES
!insertmacro MUI_LANGUAGE English

; --- what both the installer and the uninstaller do ---

!macro Say prefix text
    Push "${text}"
    Call ${prefix}Say
!macroend
!macro Run prefix command
    Push $8
    Push '${command}'
    Call ${prefix}Run
!macroend

!macro COMMON prefix
; A line of the installation's log. Call it with no secret.
Function ${prefix}Say
    Exch $9
    Push $0
    Push $1
    Push $2
    Push $3
    Push $4
    Push $5
    Push $6
    Push $7
    ${GetTime} "" "L" $0 $1 $2 $3 $4 $5 $6
    FileOpen $7 "$StateDir\medplum-agent-install.log" a
    FileSeek $7 0 END
    FileWriteUTF16LE /BOM $7 "$2-$1-$0 $4:$5:$6 $9$\r$\n"
    FileClose $7
    Pop $7
    Pop $6
    Pop $5
    Pop $4
    Pop $3
    Pop $2
    Pop $1
    Pop $0
    Pop $9
FunctionEnd

; Run a program without a window -> its exit code in $0; what it is and how it ended go to the log.
Function ${prefix}Run
    Exch $8
    nsExec::Exec '$8'
    Pop $0
    !insertmacro Say "${prefix}" "$8: $0"
    Pop $8
FunctionEnd

; State of the service named $R1 -> $R2; 0 when there is none.
Function ${prefix}ServiceState
    StrCpy $R2 0
    System::Call 'advapi32::OpenSCManagerW(p 0, p 0, i 1) p .r0'
    System::Call 'advapi32::OpenServiceW(p r0, w R1, i 4) p .r1'
    ${If} $1 P<> 0
        System::Alloc 28
        Pop $2
        System::Call 'advapi32::QueryServiceStatus(p r1, p r2)'
        System::Call '*$2(i, i .R2)'
        System::Free $2
        System::Call 'advapi32::CloseServiceHandle(p r1)'
    ${EndIf}
    System::Call 'advapi32::CloseServiceHandle(p r0)'
FunctionEnd

; Stop the service named $R1, and wait until it has.
Function ${prefix}StopService
    !insertmacro Run "${prefix}" 'net stop "$R1"'
    StrCpy $R3 0
    ${Do}
        Call ${prefix}ServiceState
        ${If} $R2 <= ${STOPPED}
        ${OrIf} $R3 == 30
            ${Break}
        ${EndIf}
        IntOp $R3 $R3 + 1
        Sleep 1000
    ${Loop}
FunctionEnd

; Stop, or with $R4 = delete stop and delete, the services of ours and of the reference agent (MedplumAgent,
; MedplumAgent_<version>), but for the one that is named in $R5.
Function ${prefix}EndServices
    StrCpy $R6 0
    ${Do}
        EnumRegKey $R1 HKLM "SYSTEM\CurrentControlSet\Services" $R6
        ${If} $R1 == ""
            ${Break}
        ${EndIf}
        IntOp $R6 $R6 + 1
        StrCpy $2 $R1 12
        ${If} $2 == "${SERVICE}"
        ${AndIf} $R1 != $R5
            Call ${prefix}StopService
            ${If} $R4 == delete
                !insertmacro Run "${prefix}" 'sc delete "$R1"'
                ${If} $0 == 0
                    IntOp $R6 $R6 - 1 ; the next one takes its place
                ${EndIf}
            ${EndIf}
        ${EndIf}
    ${Loop}
    Sleep 1000 ; until Windows lets go of the files
FunctionEnd

Function ${prefix}FindPlaces
    SetRegView 64
    SetShellVarContext all
    StrCpy $StateDir "$APPDATA\MedplumAgent"
FunctionEnd
!macroend
!insertmacro COMMON ""
!insertmacro COMMON "un."

; --- the four values ---

; NSIS's own GetOptions ends a value at the next slash: URLs and secrets have them.
!macro GetValue option result
    Push "${option}"
    Call GetValue
    Pop ${result}
!macroend

; Option on the stack -> its value: up to the next space, or up to the next quote where one stands before or after "=".
Function GetValue
    Exch $0
    StrLen $1 $0
    StrCpy $2 0
    ${Do}
        StrCpy $3 $R0 $1 $2
        ${If} $3 == ""
            StrCpy $0 ""
            Exch $0
            Return
        ${EndIf}
        ${If} $3 == $0
            ${Break}
        ${EndIf}
        IntOp $2 $2 + 1
    ${Loop}
    StrCpy $4 " "
    ${If} $2 > 0
        IntOp $5 $2 - 1
        StrCpy $3 $R0 1 $5
        ${If} $3 == '"'
            StrCpy $4 '"'
        ${EndIf}
    ${EndIf}
    IntOp $2 $2 + $1
    StrCpy $3 $R0 1 $2
    ${If} $3 == '"'
        StrCpy $4 '"'
        IntOp $2 $2 + 1
    ${EndIf}
    StrCpy $0 ""
    ${Do}
        StrCpy $3 $R0 1 $2
        ${If} $3 == ""
        ${OrIf} $3 == $4
            ${Break}
        ${EndIf}
        StrCpy $0 "$0$3"
        IntOp $2 $2 + 1
    ${Loop}
    Exch $0
FunctionEnd

Function .onInit
    Call FindPlaces
    ReadRegStr $0 HKLM "${UNINSTALL_KEY}" "InstallLocation"
    ${If} $0 != ""
        StrCpy $INSTDIR $0
    ${EndIf}
    ${GetParameters} $R0
    !insertmacro GetValue "/BASE_URL=" $BaseUrl
    !insertmacro GetValue "/CLIENT_ID=" $ClientId
    !insertmacro GetValue "/CLIENT_SECRET=" $ClientSecret
    !insertmacro GetValue "/AGENT_ID=" $AgentId
    !insertmacro GetValue "/CONFIG=" $ConfigFile
    ${If} $BaseUrl == ""
        StrCpy $BaseUrl "https://api.medplum.com/"
    ${EndIf}
    StrCpy $Msi no
    ClearErrors
    ${GetOptions} $R0 "/MSI" $0
    ${IfNot} ${Errors}
        StrCpy $Msi yes
    ${EndIf}
    ClearErrors
    ${GetOptions} $R0 "/UNINSTALL" $0
    ${IfNot} ${Errors}
        Call Uninstall
    ${EndIf}
    ${If} $ConfigFile != ""
    ${AndIfNot} ${FileExists} $ConfigFile
        MessageBox MB_OK|MB_ICONSTOP "There is no file $ConfigFile, which /CONFIG names." /SD IDOK
        SetErrorLevel 2
        Quit
    ${EndIf}
    ${If} ${Silent}
    ${AndIf} $ConfigFile == ""
    ${AndIfNot} ${FileExists} "$INSTDIR\agent.properties"
    ${AndIfNot} ${FileExists} "$INSTDIR\agent.toml"
        Call CheckSilentValues
    ${EndIf}
FunctionEnd

; Does not return. "_?=" keeps the uninstaller in its place, so that it can be waited for.
Function Uninstall
    StrCpy $1 ""
    ClearErrors
    ${GetOptions} $R0 "/PURGE" $0
    ${IfNot} ${Errors}
        StrCpy $1 "/PURGE"
    ${EndIf}
    ${If} ${FileExists} "$INSTDIR\uninstall.exe"
        ExecWait '"$INSTDIR\uninstall.exe" /S $1 _?=$INSTDIR' $0
        Delete "$INSTDIR\uninstall.exe"
        RMDir "$INSTDIR"
        SetErrorLevel $0
    ${EndIf}
    Quit
FunctionEnd

Function CheckSilentValues
    ${If} $ClientId == ""
    ${OrIf} $ClientSecret == ""
    ${OrIf} $AgentId == ""
        SetErrorLevel 2
        Quit
    ${EndIf}
FunctionEnd

Function AskValues
    ${If} ${FileExists} "$INSTDIR\agent.properties"
    ${OrIf} ${FileExists} "$INSTDIR\agent.toml"
    ${OrIf} $ConfigFile != ""
        Abort ; nothing to ask
    ${EndIf}
    !insertmacro MUI_HEADER_TEXT "Connect to the Medplum server" "Values of the ClientApplication and the Agent resource"
    nsDialogs::Create 1018
    Pop $0
    ${NSD_CreateLabel} 0 0 100% 10u "Base URL of the server"
    Pop $0
    ${NSD_CreateText} 0 11u 100% 13u "$BaseUrl"
    Pop $Field1
    ${NSD_CreateLabel} 0 29u 100% 10u "Client ID"
    Pop $0
    ${NSD_CreateText} 0 40u 100% 13u "$ClientId"
    Pop $Field2
    ${NSD_CreateLabel} 0 58u 100% 10u "Client secret"
    Pop $0
    ${NSD_CreatePassword} 0 69u 100% 13u "$ClientSecret"
    Pop $Field3
    ${NSD_CreateLabel} 0 87u 100% 10u "Agent ID"
    Pop $0
    ${NSD_CreateText} 0 98u 100% 13u "$AgentId"
    Pop $Field4
    nsDialogs::Show
FunctionEnd

Function TakeValues
    ${NSD_GetText} $Field1 $BaseUrl
    ${NSD_GetText} $Field2 $ClientId
    ${NSD_GetText} $Field3 $ClientSecret
    ${NSD_GetText} $Field4 $AgentId
    ${If} $BaseUrl == ""
    ${OrIf} $ClientId == ""
    ${OrIf} $ClientSecret == ""
    ${OrIf} $AgentId == ""
        MessageBox MB_OK|MB_ICONEXCLAMATION "All four values are needed."
        Abort
    ${EndIf}
FunctionEnd

; --- install ---
;
; Nothing of what was there is deleted before the new service runs. A step that fails calls GoBack: the old program,
; settings and service are as they were, and run.

Section "Install"
    SetDetailsPrint none
    Call CloseStateDir
    !insertmacro Say "" "installing ${VERSION} to $INSTDIR"
    Call LookAtService
    StrCpy $R4 stop
    StrCpy $R5 ""
    Call EndServices
    Call PutAside
    SetOutPath "$INSTDIR"
    ClearErrors
    File "/oname=shawl.exe" "${SHAWL}"
    File "/oname=README.md" "${README}"
    SetOutPath "$INSTDIR\program"
    File /r "${FOLDER}\*.*"
    SetOutPath "$INSTDIR"
    ${If} ${Errors}
        StrCpy $R9 "the files cannot be written"
        Call GoBack
    ${EndIf}
    Call MakeService
    Call WriteSettings
    nsExec::Exec 'icacls "$StateDir" /grant:r "$Account:(OI)(CI)M"'
    Pop $0
    Call StartService
    Call Finish
    Call Register
    !insertmacro Say "" "${VERSION} is installed"
SectionEnd

; Anybody may make folders in ProgramData. Whoever made this one owns it no more, and what stands in it has its rights.
Function CloseStateDir
    CreateDirectory "$StateDir"
    System::Call 'kernel32::GetFileAttributesW(w "$StateDir") i .r0'
    IntOp $0 $0 & ${REPARSE_POINT}
    ${If} $0 != 0
        MessageBox MB_OK|MB_ICONSTOP "$StateDir leads to another place. Remove it first." /SD IDOK
        SetErrorLevel 2
        Quit
    ${EndIf}
    ReadRegStr $0 HKLM "SYSTEM\CurrentControlSet\Services\${SERVICE}" "ObjectName"
    StrCpy $Account ${SERVICE_SID}
    ${If} $0 != ""
    ${AndIf} $0 != "${SERVICE_ACCOUNT}"
    ${AndIf} $0 != "NT AUTHORITY\LocalService" ; which earlier versions of this installer set
    ${AndIf} $0 != "LocalSystem" ; which may more than the agent needs
        StrCpy $Account $0
    ${EndIf}
    nsExec::Exec 'icacls "$StateDir" /setowner "*S-1-5-32-544" /T /C /L /Q'
    Pop $1
    nsExec::Exec 'icacls "$StateDir" /inheritance:r ${SYSTEM_ACCOUNTS} /grant:r "$Account:(OI)(CI)M"'
    Pop $2
    nsExec::Exec 'icacls "$StateDir\*" /reset /T /C /L /Q'
    Pop $3
    !insertmacro Say "" "the data folder is closed to others, for $Account (owner: $1, rights: $2, below: $3)"
FunctionEnd

Function LookAtService
    StrCpy $Existed no
    StrCpy $WasRunning no
    StrCpy $R1 ${SERVICE}
    Call ServiceState
    ${If} $R2 != 0
        StrCpy $Existed yes
    ${EndIf}
    ${If} $R2 == ${RUNNING}
        StrCpy $WasRunning yes
    ${EndIf}
    !insertmacro Say "" "the service was there: $Existed, running: $WasRunning"
FunctionEnd

; What is replaced gets the ending .old.
Function PutAside
    RMDir /r "$INSTDIR\program.old"
    Delete "$INSTDIR\shawl.exe.old"
    ClearErrors
    ${If} ${FileExists} "$INSTDIR\program\*.*"
        Rename "$INSTDIR\program" "$INSTDIR\program.old"
    ${EndIf}
    ${If} ${FileExists} "$INSTDIR\shawl.exe"
        Rename "$INSTDIR\shawl.exe" "$INSTDIR\shawl.exe.old"
    ${EndIf}
    ${If} ${Errors}
        StrCpy $R9 "the files of the installed version are in use"
        Call GoBack
    ${EndIf}
FunctionEnd

; Why in $R9. Does not return.
Function GoBack
    !insertmacro Say "" "failed: $R9"
    StrCpy $R1 ${SERVICE}
    Call StopService
    SetOutPath "$TEMP"
    ${If} ${FileExists} "$INSTDIR\program.old\*.*"
        RMDir /r "$INSTDIR\program"
        Rename "$INSTDIR\program.old" "$INSTDIR\program"
    ${EndIf}
    ${If} ${FileExists} "$INSTDIR\shawl.exe.old"
        Delete "$INSTDIR\shawl.exe"
        Rename "$INSTDIR\shawl.exe.old" "$INSTDIR\shawl.exe"
    ${EndIf}
    Call OldSettings
    ${If} $Existed == no
        !insertmacro Run "" 'sc delete "${SERVICE}"'
    ${ElseIf} $WasRunning == yes
        !insertmacro Run "" 'net start "${SERVICE}"'
    ${EndIf}
    Call StartReference
    !insertmacro Say "" "what was there before is there again"
    SetErrorLevel 2
    MessageBox MB_OK|MB_ICONSTOP "The installation failed: $R9.$\r$\nWhat was there before is there again. $StateDir\medplum-agent-install.log says more." /SD IDOK
    Quit
FunctionEnd

; The reference agent's services, which still are there.
Function StartReference
    StrCpy $R6 0
    ${Do}
        EnumRegKey $R1 HKLM "SYSTEM\CurrentControlSet\Services" $R6
        ${If} $R1 == ""
            ${Break}
        ${EndIf}
        IntOp $R6 $R6 + 1
        StrCpy $2 $R1 13
        ${If} $2 == "${SERVICE}_"
            !insertmacro Run "" 'net start "$R1"'
        ${EndIf}
    ${Loop}
FunctionEnd

; A service that is there keeps its log-on, recovery and dependencies; only its command line is set.
Function MakeService
    StrCpy $R7 '"$INSTDIR\shawl.exe" run --name ${SERVICE} --cwd "$INSTDIR" --log-dir "$StateDir" --no-log-cmd --no-restart --stop-timeout 20000 -- "$INSTDIR\program\medplum-agent.exe"'
    System::Call 'advapi32::OpenSCManagerW(p 0, p 0, i ${SC_MANAGER_ALL}) p .r0'
    ${If} $Existed == no
        StrCpy $4 0
        ${Do} ; a service that was deleted lives until the last window that shows it is closed
            System::Call 'advapi32::CreateServiceW(p r0, w "${SERVICE}", w "Medplum Agent", i ${SERVICE_ALL}, i 0x10, i 2, i 1, w R7, p 0, p 0, p 0, w "${SERVICE_ACCOUNT}", p 0) p .r1 ?e'
            Pop $3
            IntOp $4 $4 + 1
            ${If} $1 P<> 0
            ${OrIf} $4 == 20
                ${Break}
            ${EndIf}
            Sleep 1000
        ${Loop}
        StrCpy $2 $1
    ${Else}
        System::Call 'advapi32::OpenServiceW(p r0, w "${SERVICE}", i ${SERVICE_ALL}) p .r1'
        ReadRegStr $6 HKLM "SYSTEM\CurrentControlSet\Services\${SERVICE}" "ObjectName"
        ${If} $Account == ${SERVICE_SID}
        ${AndIf} $6 != "${SERVICE_ACCOUNT}"
            System::Call 'advapi32::ChangeServiceConfigW(p r1, i ${NO_CHANGE}, i ${NO_CHANGE}, i ${NO_CHANGE}, w R7, p 0, p 0, p 0, w "${SERVICE_ACCOUNT}", w "", p 0) i .r2 ?e'
        ${Else}
            System::Call 'advapi32::ChangeServiceConfigW(p r1, i ${NO_CHANGE}, i ${NO_CHANGE}, i ${NO_CHANGE}, w R7, p 0, p 0, p 0, p 0, p 0, p 0) i .r2 ?e'
        ${EndIf}
        Pop $3
    ${EndIf}
    System::Call 'advapi32::CloseServiceHandle(p r1)'
    System::Call 'advapi32::CloseServiceHandle(p r0)'
    ${If} $2 P= 0
        StrCpy $R9 "the service cannot be made or changed (error $3)"
        Call GoBack
    ${EndIf}
    ${If} $Existed == no ; Windows starts it again with a growing delay, also when it ends by itself with an error
        !insertmacro Run "" 'sc description ${SERVICE} "Carries messages between hospital devices and a Medplum server."'
        !insertmacro Run "" 'sc sidtype ${SERVICE} unrestricted'
        !insertmacro Run "" 'sc failure ${SERVICE} reset= 3600 actions= restart/5000/restart/15000/restart/60000'
        !insertmacro Run "" 'sc failureflag ${SERVICE} 1'
    ${EndIf}
    nsExec::Exec 'netsh advfirewall firewall show rule name="${FIREWALL_RULE}"'
    Pop $0
    ${If} $0 != 0
        !insertmacro Run "" 'netsh advfirewall firewall add rule name="${FIREWALL_RULE}" dir=in action=allow program="$INSTDIR\program\medplum-agent.exe" profile=domain,private enable=yes'
    ${EndIf}
FunctionEnd

; Settings that /CONFIG names replace those that are there; without it these are kept. The file is closed to other users
; before the secret is in it.
Function WriteSettings
    ${If} $ConfigFile != ""
        StrCpy $R8 "$INSTDIR\agent.properties"
        StrCpy $0 $ConfigFile "" -5
        ${If} $0 == ".toml"
            StrCpy $R8 "$INSTDIR\agent.toml"
        ${EndIf}
        CopyFiles /SILENT "$ConfigFile" "$PLUGINSDIR\settings" ; it may be the one that is put aside
        Delete "$INSTDIR\agent.properties.old"
        Delete "$INSTDIR\agent.toml.old"
        ${If} ${FileExists} "$INSTDIR\agent.properties"
            Rename "$INSTDIR\agent.properties" "$INSTDIR\agent.properties.old"
        ${EndIf}
        ${If} ${FileExists} "$INSTDIR\agent.toml"
            Rename "$INSTDIR\agent.toml" "$INSTDIR\agent.toml.old"
        ${EndIf}
        FileOpen $0 $R8 w
        FileClose $0
        Call CloseSettings
        ClearErrors
        CopyFiles /SILENT "$PLUGINSDIR\settings" $R8
        ${If} ${Errors}
            StrCpy $R9 "$ConfigFile cannot be copied"
            Call GoBack
        ${EndIf}
        Delete "$PLUGINSDIR\settings"
        !insertmacro Say "" "settings are those of $ConfigFile; earlier ones are in agent.*.old"
    ${ElseIfNot} ${FileExists} "$INSTDIR\agent.properties"
    ${AndIfNot} ${FileExists} "$INSTDIR\agent.toml"
        StrCpy $R8 "$INSTDIR\agent.properties"
        FileOpen $0 $R8 w
        FileClose $0
        Call CloseSettings
        FileOpen $0 $R8 a
        FileWrite $0 "baseUrl=$BaseUrl$\r$\n"
        FileWrite $0 "clientId=$ClientId$\r$\n"
        FileWrite $0 "clientSecret=$ClientSecret$\r$\n"
        FileWrite $0 "agentId=$AgentId$\r$\n"
        FileClose $0
        !insertmacro Say "" "settings are the four values that were given"
    ${Else}
        !insertmacro Say "" "settings are kept"
    ${EndIf}
    ${For} $R7 1 2
        StrCpy $R8 "$INSTDIR\agent.properties"
        ${If} $R7 == 2
            StrCpy $R8 "$INSTDIR\agent.toml"
        ${EndIf}
        Call CloseSettings
    ${Next}
FunctionEnd

; The file named in $R8.
Function CloseSettings
    ${If} ${FileExists} $R8
        nsExec::Exec 'icacls "$R8" /inheritance:r /grant:r "*S-1-5-18:F" "*S-1-5-32-544:F" "$Account:R"'
        Pop $1
    ${EndIf}
FunctionEnd

Function OldSettings
    ${If} $ConfigFile == ""
        Return
    ${EndIf}
    ${If} ${FileExists} "$INSTDIR\agent.properties.old"
    ${OrIf} ${FileExists} "$INSTDIR\agent.toml.old"
        Delete "$INSTDIR\agent.properties"
        Delete "$INSTDIR\agent.toml"
        Rename "$INSTDIR\agent.properties.old" "$INSTDIR\agent.properties"
        Rename "$INSTDIR\agent.toml.old" "$INSTDIR\agent.toml"
    ${EndIf}
FunctionEnd

; It runs, and still does after what settings that cannot work need to end it.
Function StartService
    StrCpy $R3 0
    ${Do} ; while Windows starts its own services, it starts no other
        !insertmacro Run "" 'sc start ${SERVICE}'
        IntOp $R3 $R3 + 1
        ${If} $0 == 0
        ${OrIf} $R3 == 10
            ${Break}
        ${EndIf}
        Sleep 1000
    ${Loop}
    StrCpy $R1 ${SERVICE}
    ${Do}
        Sleep 1000
        Call ServiceState
        IntOp $R3 $R3 + 1
        ${If} $R2 == ${RUNNING}
        ${OrIf} $R3 == 30
            ${Break}
        ${EndIf}
    ${Loop}
    Sleep 5000
    Call ServiceState
    !insertmacro Say "" "the service's state is $R2 (${RUNNING}: running)"
    ${If} $R2 == ${RUNNING}
        Return
    ${EndIf}
    StrCpy $R9 "the service does not run"
    ${If} $Existed == yes
        Call GoBack
    ${EndIf}
    SetErrorLevel 3
    MessageBox MB_OK|MB_ICONEXCLAMATION "Medplum Agent is installed, but its service does not run. The logs in $StateDir say why." /SD IDOK
FunctionEnd

; The new service runs: what it replaces goes.
Function Finish
    StrCpy $R4 delete
    StrCpy $R5 ${SERVICE}
    Call EndServices
    RMDir /r "$INSTDIR\program.old"
    Delete "$INSTDIR\shawl.exe.old"
    Delete "$INSTDIR\medplum-agent-*.exe" ; of the reference agent
    Delete "$INSTDIR\shawl-*.exe"
FunctionEnd

Function Register
    WriteUninstaller "$INSTDIR\uninstall.exe"
    WriteRegDWORD HKLM "${UNINSTALL_KEY}" "SystemComponent" 0
    ${If} $Msi == yes ; which has an entry of its own
        WriteRegDWORD HKLM "${UNINSTALL_KEY}" "SystemComponent" 1
    ${EndIf}
    WriteRegStr HKLM "${UNINSTALL_KEY}" "DisplayName" "Medplum Agent"
    WriteRegStr HKLM "${UNINSTALL_KEY}" "DisplayVersion" "${VERSION}"
    WriteRegStr HKLM "${UNINSTALL_KEY}" "Publisher" "Medplum Agent"
    WriteRegStr HKLM "${UNINSTALL_KEY}" "InstallLocation" "$INSTDIR"
    WriteRegStr HKLM "${UNINSTALL_KEY}" "UninstallString" '"$INSTDIR\uninstall.exe"'
    WriteRegStr HKLM "${UNINSTALL_KEY}" "QuietUninstallString" '"$INSTDIR\uninstall.exe" /S'
    WriteRegDWORD HKLM "${UNINSTALL_KEY}" "NoModify" 1
    WriteRegDWORD HKLM "${UNINSTALL_KEY}" "NoRepair" 1
    ${GetSize} "$INSTDIR" "/S=0K" $0 $1 $2
    WriteRegDWORD HKLM "${UNINSTALL_KEY}" "EstimatedSize" $0
    ; Errors of the agent are event 1 of this source; EventCreate, a part of Windows, shows such events as their text
    WriteRegExpandStr HKLM "${EVENT_KEY}" "EventMessageFile" "%SystemRoot%\System32\EventCreate.exe"
    WriteRegDWORD HKLM "${EVENT_KEY}" "TypesSupported" 7
    CreateDirectory "$SMPROGRAMS\Medplum Agent"
    CreateShortcut "$SMPROGRAMS\Medplum Agent\Uninstall.lnk" "$INSTDIR\uninstall.exe"
FunctionEnd

; --- uninstall ---

Function un.onInit
    Call un.FindPlaces
    ${GetParameters} $R0
    ClearErrors
    ${GetOptions} $R0 "/PURGE" $Purge
    ${If} ${Errors}
        StrCpy $Purge no
        MessageBox MB_YESNO|MB_ICONQUESTION|MB_DEFBUTTON2 "Delete the messages that wait in $StateDir and the logs, too?" /SD IDNO IDNO kept
        StrCpy $Purge yes
    ${Else}
        StrCpy $Purge yes
    ${EndIf}
    kept:
FunctionEnd

Section "Uninstall"
    SetDetailsPrint none
    StrCpy $R4 delete
    StrCpy $R5 ""
    Call un.EndServices
    !insertmacro Run "un." 'netsh advfirewall firewall delete rule name="${FIREWALL_RULE}"'
    RMDir /r "$INSTDIR\program"
    Delete "$INSTDIR\shawl.exe"
    Delete "$INSTDIR\README.md"
    Delete "$INSTDIR\uninstall.exe"
    Delete "$SMPROGRAMS\Medplum Agent\Uninstall.lnk"
    RMDir "$SMPROGRAMS\Medplum Agent"
    DeleteRegKey HKLM "${UNINSTALL_KEY}"
    DeleteRegKey HKLM "${EVENT_KEY}"
    ${If} $Purge == yes
        Delete "$INSTDIR\agent.properties"
        Delete "$INSTDIR\agent.toml"
        Delete "$INSTDIR\agent.properties.old"
        Delete "$INSTDIR\agent.toml.old"
        RMDir /r "$StateDir"
    ${EndIf}
    RMDir "$INSTDIR"
SectionEnd
